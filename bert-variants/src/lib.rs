//! BERT variants that differ in position encoding only: pretraining, comparison and
//! Hugging Face checkpoints, on Candle.

pub mod config;
pub mod data;
pub mod model;
pub mod parameters;
pub mod record;
pub mod report;
