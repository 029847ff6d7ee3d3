use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_rope_attn::ops::{Gradients, Tape, checkpoint, embedding, gelu, linear, linear_add};

use crate::common::{Input, assert_close, device_tests, values};

device_tests!(
    checkpoints_any_function,
    adds_all_uses_of_a_tensor,
    begins_anywhere,
    leaves_out_what_is_frozen,
    takes_narrow_weights,
);

fn var(shape: &[usize], seed: u64, device: &Device) -> Result<Var> {
    Input::random(shape, DType::F32, seed).var(device)
}

/// Compares the gradients of `loss` on a tape, run twice into one store, with Candle's.
fn check(name: &str, vars: &[&Var], loss: impl Fn() -> candle_core::Result<Tensor>) -> Result<()> {
    let in_graph = loss()?.backward()?;
    let mut on_tape = Gradients::default();
    for _ in 0..2 {
        let (loss, tape) = Tape::record(&loss)?;
        tape.backward(&loss, 0.5, &mut on_tape)?;
    }
    for (i, var) in vars.iter().enumerate() {
        let name = format!("{name} gradient {i}");
        let expected = in_graph.get(var).with_context(|| name.clone())?;
        let got = on_tape.remove(var).with_context(|| name.clone())?;
        assert_close(&name, &got, &values(expected)?)?;
    }
    Ok(())
}

fn checkpoints_any_function(device: &Device) -> Result<()> {
    let (x, weight) = (var(&[5, 8], 1, device)?, var(&[8, 8], 2, device)?);
    let inner = weight.as_tensor().clone();
    // It ends in an operation of Candle's.
    let layer = move |x: &Tensor| (linear(x, &inner, None)? + x)?.tanh();
    check("checkpoint", &[&x, &weight], || {
        let y = checkpoint(&gelu(&x)?, layer.clone())?;
        gelu(&checkpoint(&y, layer.clone())?)?.sum_all()
    })
}

fn adds_all_uses_of_a_tensor(device: &Device) -> Result<()> {
    let (x, weight) = (var(&[7, 8], 1, device)?, var(&[8, 8], 2, device)?);
    check("several uses", &[&x, &weight], || {
        let y = linear_add(&x, &weight, None, &x)?;
        let z = linear(&linear(&y, &weight, None)?, &weight, None)?;
        (gelu(&z)? * &y)?.sum_all()
    })
}

fn begins_anywhere(device: &Device) -> Result<()> {
    let (x, weight) = (var(&[7, 8], 1, device)?, var(&[8, 8], 2, device)?);
    let grad = var(&[7, 8], 3, device)?;
    // The last operation is ours, then Candle's.
    for last in [gelu, Tensor::tanh] {
        let function = || last(&linear(&x, &weight, None)?);
        let in_graph = (function()? * grad.as_tensor())?.sum_all()?.backward()?;
        let (y, tape) = Tape::record(function)?;
        let mut on_tape = Gradients::default();
        tape.backward_from(&y, &grad, &mut on_tape)?;
        for var in [&x, &weight] {
            let expected = in_graph.get(var).context("no gradient")?;
            let got = on_tape.remove(var).context("no gradient")?;
            assert_close("a gradient", &got, &values(expected)?)?;
        }
    }
    let (y, tape) = Tape::record(|| gelu(&x))?;
    let narrow = grad.narrow(1, 0, 4)?;
    let error = tape.backward_from(&y, &narrow, &mut Gradients::default());
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("[7, 4]") && error.contains("[7, 8]"),
        "{error}"
    );
    Ok(())
}

fn leaves_out_what_is_frozen(device: &Device) -> Result<()> {
    let (x, weight) = (var(&[7, 8], 1, device)?, var(&[8, 8], 2, device)?);
    let frozen = weight.as_detached_tensor();
    check("frozen weight", &[&x], || {
        gelu(&linear(&x, &frozen, None)?)?.sum_all()
    })?;
    let frozen = x.as_detached_tensor();
    check("frozen input", &[&weight], || {
        gelu(&linear(&frozen, &weight, None)?)?.sum_all()
    })
}

/// A bf16 table that is a weight too has gradients of two dtypes.
fn takes_narrow_weights(device: &Device) -> Result<()> {
    let table = Input::random(&[6, 8], DType::BF16, 1).var(device)?;
    let ids = Tensor::new(&[0u32, 5, 5, 2], device)?;
    let loss = || -> candle_core::Result<Tensor> {
        let x = embedding(&ids, &table)?;
        let y = linear(&x, &gelu(&table)?, None)?;
        linear(&x, &table, None)?
            .mul(&y)?
            .to_dtype(DType::F32)?
            .sum_all()
    };
    let (loss, tape) = Tape::record(loss)?;
    let mut on_tape = Gradients::default();
    tape.backward(&loss, 1.0, &mut on_tape)?;
    let got = on_tape.remove(&table).context("no gradient")?;
    let wide = Var::from_tensor(&table.to_dtype(DType::F32)?)?;
    let x = embedding(&ids, &wide)?;
    let y = linear(&x, &gelu(&wide)?, None)?;
    let expected = (linear(&x, &wide, None)? * y)?.sum_all()?.backward()?;
    let expected = values(expected.get(&wide).context("no gradient")?)?;
    let largest = expected.iter().fold(0.0, |max: f64, x| max.max(x.abs()));
    for (got, expected) in values(&got)?.iter().zip(expected) {
        anyhow::ensure!(
            (got - expected).abs() < 0.02 * largest,
            "{got}, not {expected}"
        );
    }
    Ok(())
}
