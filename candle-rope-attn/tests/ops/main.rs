//! The training operations against plain f64 code, forward and backward, on every device.

mod adamw;
mod common;
mod cross_entropy;
mod dropout;
mod errors;
mod gather;
mod gelu;
mod global_norm;
mod layer_norm;
mod linear;
mod linear_cross_entropy;
mod projected;
mod rope;
mod tape;
mod threads;
