//! Differentiable operations besides attention.
