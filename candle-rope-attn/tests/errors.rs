//! Every wrong input gets a message that says what was got, what is needed, and what to do.

mod common;

use candle_core::{DType, Result, Tensor};
use candle_rope_attn::{
    Alibi, AttentionSpec, Dropout, PositionEncoding, RelativeBias, Rope, RopePairing, RopeScaling,
    Sequences, Yarn, attention, attention_qkvpacked, attention_qkvpacked_with_bias, ops::rope,
};
use common::{assert_error, f32s, zeros};

fn spec() -> AttentionSpec {
    AttentionSpec::new(2, 8)
}

/// Of valid q, k and v with a spec.
fn with_spec(spec: AttentionSpec) -> Result<Tensor> {
    attention_qkvpacked(&f32s(&[1, 4, 3, 2, 8]), &spec, &Sequences::Dense)
}

#[test]
fn shapes() {
    let dense = &Sequences::Dense;
    assert_error(
        attention_qkvpacked(&f32s(&[1, 4, 3, 2, 7]), &spec(), dense),
        &["[3, 2, 8]", "[1, 4, 3, 2, 7]", "reshape"],
    );
    assert_error(
        attention_qkvpacked(&f32s(&[1, 4, 2, 8]), &spec(), dense),
        &["[3, 2, 8]", "[1, 4, 2, 8]"],
    );
    assert_error(
        attention_qkvpacked(&f32s(&[8]), &spec(), dense),
        &["[3, 2, 8]", "[8]"],
    );
    assert_error(
        attention_qkvpacked(&f32s(&[4, 3, 2, 8]), &spec(), dense),
        &["[batch, seqlen, ..]", "[4]", "unsqueeze"],
    );
    assert_error(
        attention_qkvpacked(
            &f32s(&[1, 4, 3, 2, 8]),
            &spec(),
            &Sequences::CuSeqlens(vec![0, 4]),
        ),
        &["[total_tokens, ..]", "[1, 4]", "flatten"],
    );
    let (q, k) = (f32s(&[1, 4, 2, 8]), f32s(&[1, 5, 2, 8]));
    assert_error(
        attention(&q, &k, &k, &spec(), dense),
        &["one shape and dtype", "[1, 4, 2, 8]", "k [1, 5, 2, 8]"],
    );
}

#[test]
fn dtypes() {
    let qkv = zeros(&[1, 4, 3, 2, 8], DType::F64);
    assert_error(
        attention_qkvpacked(&qkv, &spec(), &Sequences::Dense),
        &["F64", "F32, BF16 or F16", "to_dtype"],
    );
    let (q, v) = (f32s(&[1, 4, 2, 8]), zeros(&[1, 4, 2, 8], DType::BF16));
    assert_error(
        attention(&q, &q, &v, &spec(), &Sequences::Dense),
        &["one shape and dtype", "F32", "v [1, 4, 2, 8] BF16"],
    );
}

#[test]
fn sequences() {
    let dense = f32s(&[2, 4, 3, 2, 8]);
    let attend = |sequences| attention_qkvpacked(&dense, &spec(), &sequences);
    assert_error(attend(Sequences::KeyLens(vec![4])), &["2 lengths", "[4]"]);
    assert_error(
        attend(Sequences::KeyLens(vec![4, 5])),
        &["at most 4", "[4, 5]"],
    );
    assert_error(
        attend(Sequences::KeyMask(vec![true; 7])),
        &["2 * 4 = 8", "got 7"],
    );
    let packed = f32s(&[4, 3, 2, 8]);
    for bounds in [
        vec![],
        vec![0],
        vec![0, 3],
        vec![1, 4],
        vec![0, 3, 2, 4],
        vec![0, 5],
    ] {
        let got = format!("{bounds:?}");
        let sequences = Sequences::CuSeqlens(bounds);
        assert_error(
            attention_qkvpacked(&packed, &spec(), &sequences),
            &["start with 0", "the 4 tokens", &got],
        );
    }
    let many = Sequences::CuSeqlens((0..1000).collect());
    assert_error(
        attention_qkvpacked(&packed, &spec(), &many),
        &["(1000 entries)"],
    );
}

#[test]
fn specs() {
    assert_error(with_spec(AttentionSpec::new(0, 8)), &["num_heads 0"]);
    assert_error(
        with_spec(AttentionSpec::new(2, 257)),
        &["1 to 256", "257", "more heads"],
    );
    assert_error(
        with_spec(spec().with_softmax_scale(f32::NAN)),
        &["finite", "NaN"],
    );
    let dropout = |p| spec().with_dropout(Some(Dropout { p, seed: 0 }));
    assert_error(with_spec(dropout(1.0)), &["[0, 1)", "got 1"]);
    assert_error(with_spec(dropout(-0.1)), &["[0, 1)", "-0.1"]);
    let rope = Rope::from_inv_freq(vec![1.0; 3], RopePairing::HalfSplit);
    assert_error(
        with_spec(spec().with_position(PositionEncoding::Rope(rope))),
        &["3 inverse frequencies", "head_dim 6", "head_dim 8"],
    );
    assert_error(
        with_spec(spec().with_position(PositionEncoding::Alibi(Alibi::new(3)))),
        &["3 slopes", "2 heads"],
    );
}

#[test]
fn relative_bias() {
    let bias = RelativeBias {
        num_buckets: 8,
        max_distance: 20,
        bidirectional: true,
    };
    let with_bias = spec().with_position(PositionEncoding::RelativeBias(bias));
    let qkv = f32s(&[1, 4, 3, 2, 8]);
    let attend = |spec: &AttentionSpec, weight: &[usize]| {
        attention_qkvpacked_with_bias(&qkv, &f32s(weight), spec, &Sequences::Dense)
    };
    assert_error(
        with_spec(with_bias.clone()),
        &["weight", "attention_qkvpacked_with_bias"],
    );
    assert_error(attend(&with_bias, &[2, 8]), &["[8, 2]", "[2, 8]"]);
    assert_error(attend(&spec(), &[8, 2]), &["RelativeBias", "None"]);
    let few = RelativeBias {
        num_buckets: 3,
        ..bias
    };
    let few = spec().with_position(PositionEncoding::RelativeBias(few));
    assert_error(
        attend(&few, &[3, 2]),
        &["at least 4 buckets", "num_buckets 3"],
    );
}

#[test]
fn ropes() {
    let new = |dim, theta, scaling| Rope::new(dim, theta, RopePairing::HalfSplit, scaling);
    assert_error(new(7, 1e4, RopeScaling::None), &["head_dim 7", "even"]);
    assert_error(new(8, -1.0, RopeScaling::None), &["theta", "-1"]);
    assert_error(
        new(8, 1e4, RopeScaling::Linear(0.0)),
        &["scaling factor", "0"],
    );
    assert_error(
        new(8, 1e4, RopeScaling::Ntk(f64::NAN)),
        &["scaling factor", "NaN"],
    );
    assert_error(
        new(8, 1.0, RopeScaling::Yarn(Yarn::new(4.0, 512))),
        &["theta 1", "not finite"],
    );
    assert_error(
        new(8, 1e4, RopeScaling::Yarn(Yarn::new(4.0, 0))),
        &["original length", "0"],
    );
    let four = Rope::from_inv_freq(vec![1.0; 2], RopePairing::HalfSplit);
    assert_error(
        rope(&f32s(&[1, 4, 2, 8]), &four, &Sequences::Dense),
        &["2 inverse frequencies", "width 4", "[1, 4, 2, 8]"],
    );
    assert_error(
        rope(&f32s(&[4, 2, 4]), &four, &Sequences::CuSeqlens(vec![0, 3])),
        &["rope", "the 4 tokens", "[0, 3]"],
    );
    assert_error(
        rope(
            &zeros(&[4, 2, 4], DType::U32),
            &four,
            &Sequences::CuSeqlens(vec![0, 4]),
        ),
        &["U32", "to_dtype"],
    );
}
