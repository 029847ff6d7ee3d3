//! What there is on a GPU alone: errors, inputs that lie apart, and graphs.
#![cfg(feature = "cuda")]

mod common;

use std::ops::Deref;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_rope_attn::ops::{embedding, layer_norm, linear, mlp_add, overwrite, upload};
use candle_rope_attn::{
    AttentionSpec, CudaMemory, Graph, PositionEncoding, RelativeBias, Rope, RopePairing,
    RopeScaling, Sequences, attention, attention_projected, attention_qkvpacked_with_bias,
    cuda_device, cuda_device_name,
};
use common::to_f64;

/// One test at a time, as some measure memory.
static TURN: Mutex<()> = Mutex::new(());

struct Gpu {
    device: Device,
    _turn: MutexGuard<'static, ()>,
}

impl Deref for Gpu {
    type Target = Device;

    fn deref(&self) -> &Device {
        &self.device
    }
}

fn gpu() -> Option<Gpu> {
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let device = common::gpu()?;
    Some(Gpu {
        device,
        _turn: turn,
    })
}

#[test]
fn a_missing_gpu_is_named() {
    let error = match cuda_device(99) {
        Ok(_) => panic!("a hundred GPUs"),
        Err(error) => error.to_string(),
    };
    let expected = match gpu() {
        Some(_) => "GPU 99 does not exist",
        None => "cannot start the NVIDIA driver",
    };
    assert!(error.starts_with(expected), "{error}");
}

#[test]
fn a_gpu_has_a_name() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    let name = cuda_device_name(&device)?;
    assert!(name.is_some_and(|name| !name.trim().is_empty()));
    assert_eq!(cuda_device_name(&Device::Cpu)?, None);
    Ok(())
}

#[test]
fn too_many_buckets_are_refused_before_the_forward_pass() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    let qkv = Tensor::zeros((1, 4, 3, 2, 8), DType::F32, &device)?;
    let attend = |num_buckets| {
        let bias = RelativeBias {
            num_buckets,
            max_distance: 1000,
            bidirectional: true,
        };
        let weight = Tensor::zeros((num_buckets, 2), DType::F32, &device)?;
        let spec = AttentionSpec::new(2, 8).with_position(PositionEncoding::RelativeBias(bias));
        attention_qkvpacked_with_bias(&qkv, &weight, &spec, &Sequences::Dense)
    };
    attend(RelativeBias::MAX_CUDA_BUCKETS)?;
    let error = match attend(RelativeBias::MAX_CUDA_BUCKETS + 1) {
        Ok(_) => panic!("the kernels take more buckets than they say"),
        Err(error) => error.to_string(),
    };
    assert!(error.contains("1025 buckets"), "{error}");
    assert!(error.contains("at most 1024"), "{error}");
    Ok(())
}

#[test]
fn running_out_of_memory_says_what_to_do() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    // 2^44 bytes of output; the input is one row, seen again and again.
    let row = Tensor::zeros((1, 1, 1, 64), DType::BF16, &device)?;
    let x = row.expand((1 << 10, 1 << 17, 1 << 10, 64))?;
    let spec = AttentionSpec::new(1 << 10, 64);
    let error = match attention(&x, &x, &x, &spec, &Sequences::Dense) {
        Ok(_) => panic!("the GPU has 16 TiB"),
        Err(error) => error.to_string(),
    };
    assert!(error.contains("out of GPU memory"), "{error}");
    // The device goes on working.
    let x = row.expand((1, 3, 2, 64))?;
    let out = attention(&x, &x, &x, &AttentionSpec::new(2, 64), &Sequences::Dense)?;
    assert_eq!(to_f64(&out)?, vec![0.0; 3 * 2 * 64]);
    Ok(())
}

#[test]
fn strides_do_not_matter() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    let (batch, seqlen, heads, width) = (2, 70, 3, 40);
    let spec = AttentionSpec::new(heads, width);
    for dtype in [DType::F32, DType::BF16] {
        // Heads before tokens, as after a transpose; and rows that begin at odd places.
        let qkv = Tensor::randn(0f32, 1.0, (3, batch, heads, seqlen, width + 3), &device)?;
        let qkv = qkv.to_dtype(dtype)?.narrow(4, 1, width)?.transpose(2, 3)?;
        let parts = [qkv.get(0)?, qkv.get(1)?, qkv.get(2)?];
        let strided = attention(&parts[0], &parts[1], &parts[2], &spec, &Sequences::Dense)?;
        let parts = [
            parts[0].contiguous()?,
            parts[1].contiguous()?,
            parts[2].contiguous()?,
        ];
        let contiguous = attention(&parts[0], &parts[1], &parts[2], &spec, &Sequences::Dense)?;
        assert_eq!(to_f64(&strided)?, to_f64(&contiguous)?);
    }
    Ok(())
}

/// A transformer layer in bf16 on embeddings, and the tensors that may change.
struct Layer {
    ids: Tensor,
    table: Var,
    norm: [Tensor; 2],
    weights: [Tensor; 6],
    spec: AttentionSpec,
    sequences: Sequences,
}

impl Layer {
    const WIDTH: usize = 128;
    const VOCAB: u32 = 50;

    fn new(cu_seqlens: &[usize], device: &Device) -> Result<Self> {
        let width = Self::WIDTH;
        let random = |dims: &[usize]| Tensor::randn(0f32, 0.3, dims, device)?.to_dtype(DType::BF16);
        let rope = Rope::new(64, 10_000.0, RopePairing::HalfSplit, RopeScaling::None)?;
        let tokens = cu_seqlens.last().copied().unwrap_or(0);
        Ok(Self {
            ids: Tensor::zeros(tokens, DType::U32, device)?,
            table: Var::randn(0f32, 1.0, (Self::VOCAB as usize, width), device)?,
            norm: [
                Tensor::ones(width, DType::F32, device)?,
                Tensor::zeros(width, DType::F32, device)?,
            ],
            weights: [
                random(&[3 * width, width])?,
                random(&[3 * width])?,
                random(&[4 * width, width])?,
                random(&[4 * width])?,
                random(&[width, 4 * width])?,
                random(&[width])?,
            ],
            spec: AttentionSpec::new(width / 64, 64).with_position(PositionEncoding::Rope(rope)),
            sequences: Sequences::CuSeqlens(cu_seqlens.to_vec()),
        })
    }

    fn ids(&self, seed: u32) -> Vec<u32> {
        let count = self.ids.elem_count() as u32;
        (0..count)
            .map(|i| (i * i + seed * (i + 3)) % Self::VOCAB)
            .collect()
    }

    fn forward(&self, ids: &Tensor) -> Result<Tensor> {
        let [qkv, qkv_bias, up, up_bias, down, down_bias] = &self.weights;
        let x = embedding(ids, &self.table.as_detached_tensor())?;
        let x = layer_norm(&x, &self.norm[0], &self.norm[1], 1e-5)?.to_dtype(DType::BF16)?;
        let x = attention_projected(&x, qkv, Some(qkv_bias), &self.spec, &self.sequences)?;
        let x = mlp_add(&x, (up, Some(up_bias)), (down, Some(down_bias)), &x)?;
        // One that has a cuBLASLt product with few rows.
        linear(&x.narrow(0, 0, 2)?, up, None)?.sqr()
    }
}

fn used(device: &Device) -> Result<u64> {
    device.synchronize()?;
    Ok(CudaMemory::of(device)?
        .expect("a GPU with memory pools")
        .used)
}

fn error_of<T>(result: Result<T>) -> String {
    match result {
        Ok(_) => panic!("no error"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn replays_are_the_same_bits() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    for cu_seqlens in [&[0, 5][..], &[0, 1, 130, 700], &[0, 2000]] {
        let layer = Arc::new(Layer::new(cu_seqlens, &device)?);
        let eager = |seed| layer.forward(&Tensor::new(layer.ids(seed), &device)?);
        overwrite(&layer.ids, &layer.ids(0))?;
        let work = {
            let layer = layer.clone();
            move || layer.forward(&layer.ids)
        };
        let mut graph = Graph::capture(&device, work)?;
        assert_eq!(to_f64(graph.result())?, to_f64(&eager(0)?)?);
        let mut before = to_f64(graph.result())?;
        for seed in 1..4 {
            overwrite(&layer.ids, &layer.ids(seed))?;
            let got = to_f64(graph.replay()?)?;
            assert_eq!(got, to_f64(&eager(seed)?)?, "{cu_seqlens:?}, {seed}");
            assert!(got != before, "other ids give other results");
            before = got;
        }
        // As an optimizer does.
        layer.table.set(&(layer.table.as_tensor() * 0.5)?.sin()?)?;
        let got = to_f64(graph.replay()?)?;
        assert_eq!(got, to_f64(&eager(3)?)?);
        assert!(got != before, "other weights give other results");
    }
    Ok(())
}

#[test]
fn a_graph_keeps_its_tensors_and_frees_its_memory() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    let bounds = [0, 700, 3000];
    // What stays: uploads and plans.
    let warm = Layer::new(&bounds, &device)?;
    warm.forward(&warm.ids)?;
    drop(warm);
    let before = used(&device)?;

    let layer = Layer::new(&bounds, &device)?;
    let ids = layer.ids.clone();
    let inputs = used(&device)?;
    overwrite(&ids, &layer.ids(1))?;
    let expected = to_f64(&layer.forward(&ids)?)?;
    let mut graph = Graph::capture(&device, move || layer.forward(&layer.ids))?;
    graph.replay()?;
    let first = used(&device)?;
    assert!(first > inputs, "the graph's memory is counted");
    // The layer's weights belong to the work, and other uploads push out those of the capture.
    for len in 2..100 {
        let small = Layer::new(&[0, len], &device)?;
        small.forward(&small.ids)?;
    }
    for _ in 0..1000 {
        graph.replay()?;
    }
    let last = used(&device)?;
    assert_eq!(to_f64(graph.replay()?)?, expected);
    // Uploads of the loop, 32 at most: bounds, and tables of RoPE of 32 KiB.
    assert!(last < first + (2 << 20), "{first} bytes became {last}");
    let result = graph.result().clone();
    drop(graph);
    assert_eq!(to_f64(&result)?, expected, "a result outlives its graph");
    drop((result, ids));
    let after = used(&device)?;
    assert!(after < before + (2 << 20), "{before} bytes became {after}");
    Ok(())
}

#[test]
fn what_a_graph_cannot_do_is_named() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    let layer = Arc::new(Layer::new(&[0, 5], &device)?);
    let expected = to_f64(&layer.forward(&layer.ids)?)?;
    let check = |error: String, part: &str| -> Result<()> {
        assert!(error.contains(part), "{error}");
        assert!(error.contains("cannot capture a CUDA graph"), "{error}");
        assert_eq!(to_f64(&layer.forward(&layer.ids)?)?, expected);
        Ok(())
    };
    let turns = Arc::new(AtomicUsize::new(0));

    // Bounds that were not there in the run before.
    let (layers, turn) = (
        [4, 3].map(|len| Layer::new(&[0, len, 5], &device)),
        turns.clone(),
    );
    let [first, second] = layers;
    let layers = [first?, second?];
    let work = move || {
        let layer = &layers[turn.fetch_add(1, Ordering::Relaxed) % 2];
        layer.forward(&layer.ids)
    };
    check(error_of(Graph::capture(&device, work)), "cannot upload")?;

    // A tensor from the host that is another each time, and one to it.
    let (on, turn) = (device.clone(), turns.clone());
    let work =
        move || Tensor::new(turn.fetch_add(1, Ordering::Relaxed) as u32, &on)?.to_dtype(DType::F32);
    check(error_of(Graph::capture(&device, work)), "host data")?;
    let x = Tensor::ones(3, DType::F32, &device)?;
    let work = move || {
        let first: f32 = x.get(0)?.to_scalar()?;
        &x * f64::from(first)
    };
    check(error_of(Graph::capture(&device, work)), "to_cpu_storage")?;

    // Waiting for the device, which breaks the capture in the driver.
    let (x, on) = (Tensor::ones(3, DType::F32, &device)?, device.clone());
    let work = move || {
        let y = x.sqr()?;
        on.synchronize()?;
        y.sqrt()
    };
    check(error_of(Graph::capture(&device, work)), "waiting")?;

    // Another shape.
    let x = Tensor::ones(3, DType::F32, &device)?;
    let turn = turns.clone();
    let work = move || {
        x.narrow(0, 0, 1 + turn.fetch_add(1, Ordering::Relaxed) % 2)?
            .sqr()
    };
    check(error_of(Graph::capture(&device, work)), "the work gave")?;

    // The CPU.
    let work = || Tensor::new(1f32, &Device::Cpu);
    let error = error_of(Graph::capture(&Device::Cpu, work));
    assert!(error.contains("need an NVIDIA GPU"), "{error}");
    Ok(())
}

#[test]
fn a_graph_must_not_leave_tensors() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    let x = Tensor::ones(3, DType::F32, &device)?;
    let left = Arc::new(Mutex::new(Vec::new()));
    let work = {
        let left = left.clone();
        move || {
            let y = x.sqr()?;
            left.lock().unwrap().push(y.clone());
            y.sqrt()
        }
    };
    let error = error_of(Graph::capture(&device, work));
    assert!(error.contains("must keep no tensor"), "{error}");
    // Its memory is gone with the graph.
    std::mem::forget(left.lock().unwrap().pop());
    let y = Tensor::ones(3, DType::F32, &device)?.sqr()?;
    assert_eq!(to_f64(&y)?, [1.0; 3]);
    Ok(())
}

#[test]
fn overwriting_fits() -> Result<()> {
    let mut devices = vec![Device::Cpu];
    let gpu = gpu();
    devices.extend(gpu.as_ref().map(|gpu| gpu.device.clone()));
    for device in devices {
        let x = Tensor::new(&[[1u32, 2, 3], [4, 5, 6]], &device)?;
        overwrite(&x.get(1)?, &[7, 8, 9])?;
        assert_eq!(x.to_vec2::<u32>()?, [[1, 2, 3], [7, 8, 9]]);
        let error = error_of(overwrite(&x, &[1, 2]));
        assert!(error.contains("2 values"), "{error}");
        let error = error_of(overwrite(&x.narrow(1, 0, 2)?, &[1; 4]));
        assert!(error.contains("contiguous"), "{error}");
        let error = error_of(overwrite(&x.to_dtype(DType::F32)?, &[1; 6]));
        assert!(error.contains("F32"), "{error}");
        // More than one copy takes, and none.
        for len in [40_000, 0] {
            let values: Vec<u32> = (0..len).rev().collect();
            let x = upload(&values, &device)?;
            assert_eq!(x.to_vec1::<u32>()?, values);
            let values: Vec<u32> = (0..len).collect();
            overwrite(&x, &values)?;
            assert_eq!(x.to_vec1::<u32>()?, values);
        }
    }
    Ok(())
}
