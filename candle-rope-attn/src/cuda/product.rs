//! Matrix products by cuBLASLt, which adds bias and residual before it rounds.

use std::cell::RefCell;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::cublas::sys::cublasOperation_t;
use candle_core::cuda_backend::cudarc::cublaslt::result::{self, CublasError};
use candle_core::cuda_backend::cudarc::cublaslt::sys;
use candle_core::cuda_backend::cudarc::driver::CudaStream;
use candle_core::{CudaDevice, CudaStorage, DType, Error, Result, bail};
use sys::cublasLtMatmulDescAttributes_t as DescAttribute;
use sys::cublasLtMatmulPreferenceAttributes_t as PreferenceAttribute;

use super::ops::input;
use super::{Pointers, alloc, alloc_storage};
use crate::operand::Operand;
use crate::ops::product::Product;

/// The most memory for partial sums: what cuBLAS recommends for Hopper.
const MAX_WORKSPACE_BYTES: usize = 32 << 20;

/// Batches of ever new sizes would fill memory with plans.
const MAX_PLANS: usize = 4096;

thread_local! {
    /// One plan for every kind of product, as choosing an algorithm takes long.
    static PLANS: RefCell<HashMap<Key, Plan>> = RefCell::default();
}

/// A kind of product.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    gpu: usize,
    sizes: [usize; 3],
    transposed: [bool; 2],
    inputs: DType,
    output: DType,
    bias: bool,
    add: bool,
    /// Bytes that every address is a multiple of.
    alignment: usize,
}

/// See [`Product::compute`].
pub(crate) fn product(product: &Product) -> Result<CudaStorage> {
    let sizes = product.sizes();
    let [rows, inner, columns] = sizes;
    let (left, right) = (product.left.operand.cuda()?, product.right.operand.cuda()?);
    let device = left.0.device();
    let inputs = left.0.dtype();
    if right.0.dtype() != inputs {
        bail!(
            "product: got matrices of {inputs:?} and {:?}, expected one dtype",
            right.0.dtype()
        )
    }
    let bias = product.bias.map(Operand::cuda).transpose()?;
    let add = product.add.map(Operand::cuda).transpose()?;
    let mut y = alloc_storage(device, product.dtype, rows * columns)?;
    if rows * columns == 0 {
        return Ok(y);
    }
    if inner == 0 {
        bail!("product: got matrices of {rows}x0 and 0x{columns}, expected no empty sum")
    }

    let stream = device.cuda_stream();
    let mut pointers = Pointers::new(&stream)?;
    let left = input(&mut pointers, left)?;
    let right = input(&mut pointers, right)?;
    let bias = bias.map(|bias| input(&mut pointers, bias)).transpose()?;
    let add = add.map(|add| input(&mut pointers, add)).transpose()?;
    let to: *mut c_void = pointers.write_storage(&mut y)?;
    let addresses = [Some(left), Some(right), bias, add].into_iter().flatten();
    let key = Key {
        gpu: stream.context().ordinal(),
        sizes,
        transposed: [product.left.transposed, product.right.transposed],
        inputs,
        output: product.dtype,
        bias: bias.is_some(),
        add: add.is_some(),
        alignment: addresses.map(alignment).min().unwrap_or(1),
    };
    let call = Call {
        scale: product.scale,
        left,
        right,
        bias,
        add,
        to,
        stream: &stream,
    };
    PLANS.with_borrow_mut(|plans| {
        if plans.len() >= MAX_PLANS {
            plans.clear();
        }
        let plan = match plans.entry(key) {
            Entry::Occupied(plan) => plan.into_mut(),
            Entry::Vacant(place) => place.insert(Plan::new(device, key)?),
        };
        plan.run(device, &call)
    })?;
    drop(pointers);
    Ok(y)
}

/// The largest power of two, up to 256, that divides an address.
fn alignment(address: *const c_void) -> usize {
    1 << (address as usize | 256).trailing_zeros()
}

/// Factor and addresses of one product.
struct Call<'a> {
    scale: f32,
    left: *const c_void,
    right: *const c_void,
    bias: Option<*const c_void>,
    add: Option<*const c_void>,
    to: *mut c_void,
    stream: &'a CudaStream,
}

/// How cuBLASLt computes one kind of product.
struct Plan {
    description: Description,
    left: MatrixLayout,
    right: MatrixLayout,
    result: MatrixLayout,
    algorithm: sys::cublasLtMatmulAlgo_t,
    workspace_bytes: usize,
    add: bool,
}

impl Plan {
    /// cuBLAS reads row-major matrices as their transposes: it computes `right^T left^T`, which is
    /// the transpose of the result.
    fn new(device: &CudaDevice, key: Key) -> Result<Self> {
        let [rows, inner, columns] = key.sizes;
        let [left_transposed, right_transposed] = key.transposed;
        let stored = |rows: usize, columns: usize, transposed: bool| match transposed {
            false => [columns, rows],
            true => [rows, columns],
        };
        let description = Description::new()?;
        let operation = |transposed| match transposed {
            false => cublasOperation_t::CUBLAS_OP_N,
            true => cublasOperation_t::CUBLAS_OP_T,
        };
        description.set(
            DescAttribute::CUBLASLT_MATMUL_DESC_TRANSA,
            &operation(right_transposed),
        )?;
        description.set(
            DescAttribute::CUBLASLT_MATMUL_DESC_TRANSB,
            &operation(left_transposed),
        )?;
        if key.bias {
            description.set(
                DescAttribute::CUBLASLT_MATMUL_DESC_EPILOGUE,
                &sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS,
            )?;
        }
        let left = MatrixLayout::new(key.inputs, stored(rows, inner, left_transposed))?;
        let right = MatrixLayout::new(key.inputs, stored(inner, columns, right_transposed))?;
        let result = MatrixLayout::new(key.output, [columns, rows])?;

        let preference = Preference::new()?;
        preference.set(
            PreferenceAttribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
            &MAX_WORKSPACE_BYTES,
        )?;
        // Partial sums are added in f32, in a fixed order.
        preference.set(
            PreferenceAttribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
            &(sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32),
        )?;
        for attribute in [
            PreferenceAttribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            PreferenceAttribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            PreferenceAttribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
        ] {
            preference.set(attribute, &(key.alignment as u32))?;
        }
        // SAFETY: all handles are alive.
        let found = unsafe {
            result::get_matmul_algo_heuristic(
                handle(device),
                description.0,
                right.0,
                left.0,
                result.0,
                result.0,
                preference.0,
            )
        };
        let Ok(found) = found else {
            bail!(
                "cuBLASLt has no algorithm for a product of {rows}x{inner} and {inner}x{columns} {:?} to {:?}",
                key.inputs,
                key.output
            )
        };
        Ok(Self {
            description,
            left,
            right,
            result,
            algorithm: found.algo,
            workspace_bytes: found.workspaceSize,
            add: key.add,
        })
    }

    fn run(&self, device: &CudaDevice, call: &Call) -> Result<()> {
        if let Some(bias) = call.bias {
            let attribute = DescAttribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER;
            self.description.set(attribute, &bias)?;
        }
        let (one, zero) = (1f32, 0f32);
        let beta = if self.add { &one } else { &zero };
        // Most algorithms need none.
        let mut workspace = match self.workspace_bytes {
            0 => None,
            bytes => Some(alloc::<u8>(device, bytes)?),
        };
        let mut pointers = Pointers::new(call.stream)?;
        let workspace = workspace.as_mut().map(|memory| pointers.write(memory));
        // SAFETY: the pointers are live device memory of the sizes that the plan was made for, and
        // stay so until the product is enqueued.
        let enqueued = unsafe {
            result::matmul(
                handle(device),
                self.description.0,
                (&raw const call.scale).cast(),
                std::ptr::from_ref(beta).cast(),
                call.right,
                self.right.0,
                call.left,
                self.left.0,
                call.add.unwrap_or(call.to),
                self.result.0,
                call.to,
                self.result.0,
                &self.algorithm,
                workspace.unwrap_or(std::ptr::null_mut()).cast(),
                self.workspace_bytes,
                pointers.stream().cast(),
            )
        };
        explain(enqueued)
    }
}

/// A cuBLAS handle is one of cuBLASLt too.
fn handle(device: &CudaDevice) -> sys::cublasLtHandle_t {
    device.cublas_handle().handle().cast()
}

fn cuda_type(dtype: DType) -> Result<sys::cudaDataType> {
    match dtype {
        DType::F32 => Ok(sys::cudaDataType::CUDA_R_32F),
        DType::BF16 => Ok(sys::cudaDataType::CUDA_R_16BF),
        DType::F16 => Ok(sys::cudaDataType::CUDA_R_16F),
        _ => bail!("product: got dtype {dtype:?}, expected F32, BF16 or F16"),
    }
}

fn explain<T>(result: std::result::Result<T, CublasError>) -> Result<T> {
    result.map_err(|CublasError(status)| Error::msg(format!("cuBLASLt: {status:?}")))
}

/// Owns a handle of cuBLASLt.
macro_rules! owned {
    ($name:ident, $handle:ty, $destroy:path) => {
        struct $name($handle);

        impl Drop for $name {
            fn drop(&mut self) {
                // SAFETY: the handle is alive, and this is its only owner. There is nothing to do
                // about an error.
                let _: std::result::Result<(), CublasError> = unsafe { $destroy(self.0) };
            }
        }
    };
}

owned!(
    Description,
    sys::cublasLtMatmulDesc_t,
    result::destroy_matmul_desc
);
owned!(
    MatrixLayout,
    sys::cublasLtMatrixLayout_t,
    result::destroy_matrix_layout
);
owned!(
    Preference,
    sys::cublasLtMatmulPreference_t,
    result::destroy_matmul_pref
);

impl Description {
    /// Sums in f32; f32 matrices are not rounded to tf32.
    fn new() -> Result<Self> {
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        explain(result::create_matmul_desc(
            compute,
            sys::cudaDataType::CUDA_R_32F,
        ))
        .map(Self)
    }

    fn set<T>(&self, attribute: DescAttribute, value: &T) -> Result<()> {
        let value: *const T = value;
        // SAFETY: cuBLASLt copies the value, whose type is that of the attribute.
        explain(unsafe {
            result::set_matmul_desc_attribute(self.0, attribute, value.cast(), size_of::<T>())
        })
    }
}

impl MatrixLayout {
    /// Column-major, without gaps.
    fn new(dtype: DType, [rows, columns]: [usize; 2]) -> Result<Self> {
        let (dtype, stride) = (cuda_type(dtype)?, rows as i64);
        let layout = result::create_matrix_layout(dtype, rows as u64, columns as u64, stride);
        explain(layout).map(Self)
    }
}

impl Preference {
    fn new() -> Result<Self> {
        explain(result::create_matmul_pref()).map(Self)
    }

    fn set<T>(&self, attribute: PreferenceAttribute, value: &T) -> Result<()> {
        let value: *const T = value;
        // SAFETY: cuBLASLt copies the value, whose type is that of the attribute.
        explain(unsafe {
            result::set_matmul_pref_attribute(self.0, attribute, value.cast(), size_of::<T>())
        })
    }
}
