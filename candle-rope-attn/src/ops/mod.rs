//! Differentiable operations besides attention.

mod rope;

pub use rope::rope;
