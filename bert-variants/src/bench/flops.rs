//! What a model has to compute.

use crate::config::{BertConfig, LocalAttention};
use crate::data::Batch;
use crate::parameters::layout;

/// Floating-point operations of the matrix products of a forward pass, counting multiplications
/// and additions: `2 * tokens * weights of the layers + 2 * labels * weights of the head + 4 *
/// hidden_size * pairs of query and key`, the last summed over layers and sequences. What the last layer
/// does after its attention is for labels alone: those weights count as the head's.
///
/// A sequence has `seqlen^2` pairs, half of them with causal attention, and in a local layer those
/// inside of the window. A backward pass has twice the operations.
pub(super) fn forward_flops(config: &BertConfig, batch: &Batch) -> f64 {
    let [all, labels] = product_weights(config);
    let products = batch.input_ids.len() * all + batch.labels.len() * labels;
    let lens = batch
        .cu_seqlens
        .windows(2)
        .map(|bounds| bounds[1] - bounds[0]);
    let pairs: usize = lens.map(|len| attention_pairs(config, len)).sum();
    let causal = if config.is_decoder { 0.5 } else { 1.0 };
    2.0 * products as f64 + 4.0 * causal * (config.hidden_size * pairs) as f64
}

/// Weights that every token is multiplied with, and every label.
fn product_weights(config: &BertConfig) -> [usize; 2] {
    let last = format!("encoder.layer.{}.", config.num_hidden_layers - 1);
    let [mut all, mut labels] = [0; 2];
    for weight in layout(config)
        .iter()
        .filter(|weight| weight.shape.len() == 2)
    {
        let after_attention = weight.name.starts_with(&last) && !weight.name.contains(".self.");
        let size = weight.shape.iter().product::<usize>();
        if weight.name.starts_with("head.") || after_attention {
            labels += size;
        } else if weight.name.starts_with("encoder.layer.") {
            all += size;
        }
    }
    if config.tie_word_embeddings {
        labels += config.vocab_size * config.hidden_size;
    }
    [all, labels]
}

/// Pairs of query and key in all layers, for a sequence of `len` tokens.
fn attention_pairs(config: &BertConfig, len: usize) -> usize {
    let layers = config.num_hidden_layers;
    let all = len * len;
    let Some(LocalAttention {
        window,
        layers: local,
        ..
    }) = &config.local
    else {
        return layers * all;
    };
    let window = (*window).min(len.saturating_sub(1));
    // Less the triangles beyond the window on either side.
    let near = len * (2 * window + 1) - window * (window + 1);
    let local = local.iter().filter(|local| **local).count();
    local * near + (layers - local) * all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ModelType;

    #[test]
    fn flops_of_small_models_are_those_counted_by_hand() {
        // Lengths 3 and 1, labels at 2 of the tokens.
        let batch = Batch {
            input_ids: vec![1; 4],
            cu_seqlens: vec![0, 3, 4],
            label_positions: vec![0, 3],
            labels: vec![1; 2],
        };
        let config = BertConfig::new(ModelType::Bert, 24, 2, 8, 2, 16);
        // qkv 3 * 64 in two layers; output 64 and MLP 2 * 8 * 32 in the first for all tokens; in the last
        // and the head, 8 * 8 and 24 * 8, for labels.
        let products = 4 * (2 * 192 + 576) + 2 * (576 + 64 + 192);
        let pairs = 2 * (9 + 1);
        let expected = (2 * products + 4 * 8 * pairs) as f64;
        assert_eq!(forward_flops(&config, &batch), expected);
        let causal = (2 * products + 2 * 8 * pairs) as f64;
        assert_eq!(forward_flops(&config.with_decoder(true), &batch), causal);

        // Layers 1 and 2 of three are local: of 9 pairs, a window of 1 leaves 7. The gated MLP has
        // three products.
        let mut config = BertConfig::new(ModelType::Modernbert, 24, 3, 8, 2, 16);
        config.intermediate_size = 16;
        if let Some(local) = &mut config.local {
            local.window = 1;
        }
        let rest = 64 + 3 * 8 * 16;
        let products = 4 * (3 * 192 + 2 * rest) + 2 * (rest + 64 + 192);
        let pairs = (9 + 7 + 7) + 3;
        let expected = (2 * products + 4 * 8 * pairs) as f64;
        assert_eq!(forward_flops(&config, &batch), expected);
    }
}
