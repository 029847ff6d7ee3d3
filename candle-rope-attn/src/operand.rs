//! A tensor's elements on whatever device they are.

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{
    CpuStorage, CudaStorage, DType, DeviceLocation, Layout, Result, Storage, StorageRef, Tensor,
    WithDType, bail,
};

use crate::ops::cpu::values;

/// Where the elements of a tensor lie, for the time that its storage is locked.
#[derive(Clone, Copy)]
pub(crate) enum Operand<'a> {
    Cpu(&'a CpuStorage, &'a Layout),
    Cuda(&'a CudaStorage, &'a Layout),
}

impl<'a> Operand<'a> {
    pub fn layout(&self) -> &'a Layout {
        match self {
            Self::Cpu(_, layout) | Self::Cuda(_, layout) => layout,
        }
    }

    pub fn dtype(&self) -> DType {
        match self {
            Self::Cpu(storage, _) => storage.dtype(),
            Self::Cuda(storage, _) => storage.dtype(),
        }
    }

    /// On the CPU.
    pub fn cpu(self) -> Result<(&'a CpuStorage, &'a Layout)> {
        match self {
            Self::Cpu(storage, layout) => Ok((storage, layout)),
            Self::Cuda(storage, _) => mixed(storage.device().location()),
        }
    }

    /// The values of a contiguous tensor on the CPU.
    pub fn values<T: WithDType>(self) -> Result<&'a [T]> {
        let (storage, layout) = self.cpu()?;
        values(storage, layout)
    }

    /// On a GPU.
    #[cfg(feature = "cuda")]
    pub fn cuda(self) -> Result<(&'a CudaStorage, &'a Layout)> {
        match self {
            Self::Cuda(storage, layout) => Ok((storage, layout)),
            Self::Cpu(..) => mixed(DeviceLocation::Cpu),
        }
    }
}

fn mixed<T>(location: DeviceLocation) -> Result<T> {
    bail!("got a tensor on {location:?} among others elsewhere; move it with to_device")
}

/// The lock.
pub(crate) struct Locked<'a>(StorageRef<'a>, &'a Layout);

impl<'a> Locked<'a> {
    pub fn new(tensor: &'a Tensor) -> Self {
        let (storage, layout) = tensor.storage_and_layout();
        Self(storage, layout)
    }

    pub fn operand(&self) -> Result<Operand<'_>> {
        match &*self.0 {
            Storage::Cpu(storage) => Ok(Operand::Cpu(storage, self.1)),
            Storage::Cuda(storage) => Ok(Operand::Cuda(storage, self.1)),
            Storage::Metal(_) => bail!("got a tensor on Metal, expected a CPU or an NVIDIA GPU"),
        }
    }
}
