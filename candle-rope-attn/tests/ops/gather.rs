use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_rope_attn::ops::{MAX_TABLES, embedding, embedding_sum, gather_rows};

use crate::common::{
    DTYPES, Input, Reference, check_reference, compare, device_tests, random, random_indices,
    values,
};

device_tests!(
    rows_out_of_range,
    sums_of_few_rows_are_those_of_many,
    matches_reference,
    many_uses_of_one_row,
    embedding_is_the_same,
    sums_rows_of_tables
);

fn reference(inputs: &[Vec<f64>], grad: &[f64], rows: &[u32], width: usize) -> Reference {
    let table = &inputs[0];
    let mut d_table = vec![0.0; table.len()];
    let mut y = Vec::new();
    for (i, row) in rows.iter().enumerate() {
        let row = *row as usize;
        y.extend_from_slice(&table[row * width..][..width]);
        for (d, grad) in d_table[row * width..]
            .iter_mut()
            .zip(grad.iter().skip(i * width).take(width))
        {
            *d += grad;
        }
    }
    (y, vec![d_table])
}

#[test]
fn reference_is_right() {
    check_reference(&[random(4 * 3, 1)], |inputs, grad| {
        reference(inputs, grad, &[2, 0, 2, 2], 3)
    });
}

fn check(device: &Device, count: usize, width: usize, rows: &[u32]) -> Result<()> {
    if !device.is_cpu() && rows.is_empty() {
        return Ok(()); // Candle has no empty tensors on a GPU.
    }
    let indices = Tensor::new(rows, device)?;
    for dtype in DTYPES {
        compare(
            &format!("gather_rows [{count}, {width}] -> {}", rows.len()),
            device,
            &[Input::random(&[count, width], dtype, 1)],
            |x| gather_rows(&x[0], &indices),
            |inputs, grad| reference(inputs, grad, rows, width),
        )?;
    }
    Ok(())
}

fn sums_rows_of_tables(device: &Device) -> Result<()> {
    for (len, width) in [(300, 1), (300, 5), (2, 132), (300, 768), (3000, 132)] {
        let counts = [70usize, 1, 9];
        let ids = counts.map(|count| random_indices(len, count as u32, count as u64));
        let tensors = ids
            .iter()
            .map(|ids| Tensor::new(&ids[..], device))
            .collect::<candle_core::Result<Vec<_>>>()?;
        let inputs = counts.map(|count| Input::random(&[count, width], DType::F32, count as u64));
        compare(
            &format!("embedding_sum of {len} rows of width {width}"),
            device,
            &inputs,
            |tables| embedding_sum(&tensors.iter().zip(tables).collect::<Vec<_>>()),
            |inputs, grad| {
                let mut sum = vec![0.0; len * width];
                let mut grads = Vec::new();
                for (table, ids) in inputs.iter().zip(&ids) {
                    let (y, d_table) = reference(std::slice::from_ref(table), grad, ids, width);
                    sum.iter_mut().zip(y).for_each(|(sum, y)| *sum += y);
                    grads.extend(d_table);
                }
                (sum, grads)
            },
        )?;
    }
    Ok(())
}

/// For any number of tables, with rows that are not there: bit by bit.
fn sums_of_few_rows_are_those_of_many(device: &Device) -> Result<()> {
    const FEW: usize = 9;
    for tables in 1..=MAX_TABLES {
        for width in [3, 131, 132, 768] {
            let parts = (0..tables)
                .map(|i| {
                    let table = Input::random(&[50, width], DType::F32, i as u64).var(device)?;
                    let end = if device.is_cpu() { 50 } else { 51 };
                    let ids = random_indices(4500, end, i as u64 + 10);
                    Ok((Tensor::new(ids, device)?, table.as_detached_tensor()))
                })
                .collect::<Result<Vec<_>>>()?;
            let few = parts
                .iter()
                .map(|(ids, table)| Ok((ids.narrow(0, 0, FEW)?, table.clone())))
                .collect::<Result<Vec<_>>>()?;
            let sum = |parts: &[(Tensor, Tensor)]| -> Result<Vec<u32>> {
                let parts: Vec<_> = parts.iter().map(|(ids, table)| (ids, table)).collect();
                let y = embedding_sum(&parts)?.narrow(0, 0, FEW)?.flatten_all()?;
                Ok(y.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect())
            };
            assert_eq!(sum(&parts)?, sum(&few)?, "{tables} tables of width {width}");
        }
    }
    Ok(())
}

fn matches_reference(device: &Device) -> Result<()> {
    for (count, width, n) in [
        (1, 1, 1),
        (5, 3, 9),
        (7, 8, 0),
        (50, 64, 100),
        (1000, 33, 40),
        (3000, 768, 300),
        (70_000, 8, 5000),
    ] {
        check(device, count, width, &random_indices(n, count as u32, 5))?;
    }
    Ok(())
}

/// The gradient of one row is the sum over thousands of uses.
fn many_uses_of_one_row(device: &Device) -> Result<()> {
    check(device, 3, 40, &vec![1; 3001])?;
    let mostly_one: Vec<u32> = (0..4000)
        .map(|i| if i % 5 == 0 { i % 64 } else { 7 })
        .collect();
    check(device, 64, 24, &mostly_one)
}

fn embedding_is_the_same(device: &Device) -> Result<()> {
    let table = Input::random(&[10, 6], DTYPES[0], 1).var(device)?;
    let ids = Tensor::new(&[3u32, 9, 0], device)?;
    let [a, b] = [embedding(&ids, &table)?, gather_rows(&table, &ids)?];
    assert_eq!(a.to_vec2::<f32>()?, b.to_vec2::<f32>()?);
    Ok(())
}

/// On a GPU, which cannot refuse them without waiting: NaN, and no gradient. errors.rs has the CPU.
fn rows_out_of_range(device: &Device) -> Result<()> {
    if device.is_cpu() {
        return Ok(());
    }
    for dtype in DTYPES {
        let table = Input::random(&[10, 24], dtype, 1).var(device)?;
        let rows = Tensor::new(&[3u32, 10, u32::MAX, 3], device)?;
        let y = gather_rows(&table, &rows)?;
        let found: Vec<_> = values(&y)?.chunks(24).map(|row| row[0].is_nan()).collect();
        assert_eq!(found, [false, true, true, false]);
        let grads = y.sum_all()?.backward()?;
        if dtype == DType::F32 {
            let ones = table.ones_like()?.detach();
            let zero = rows.zeros_like()?;
            let sum = embedding_sum(&[(&zero, &ones), (&rows, &table.as_detached_tensor())])?;
            let expected = values(&(y.detach() + 1.0)?)?;
            for (got, expected) in values(&sum)?.iter().zip(expected) {
                assert!(got.is_nan() == expected.is_nan() && (got.is_nan() || *got == expected));
            }
        }
        let sums: Vec<f64> = values(grads.get(&table).context("no gradient")?)?
            .chunks(24)
            .map(|row| row.iter().sum())
            .collect();
        assert_eq!(sums, [0.0, 0.0, 0.0, 48.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
    }
    Ok(())
}
