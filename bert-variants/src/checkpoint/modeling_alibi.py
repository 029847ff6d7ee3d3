"""BERT with attention with linear biases (ALiBi, Press et al. 2021) in place of positions.

For transformers: AutoModelForMaskedLM.from_pretrained(DIR, trust_remote_code=True).
"""

import math

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    CausalLMOutput,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)


class AlibiConfig(PretrainedConfig):
    model_type = "alibi"

    def __init__(
        self,
        vocab_size=30522,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        hidden_act="gelu",
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
        classifier_dropout=None,
        max_position_embeddings=512,
        type_vocab_size=2,
        initializer_range=0.02,
        layer_norm_eps=1e-12,
        pad_token_id=0,
        is_decoder=False,
        tie_word_embeddings=True,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.classifier_dropout = classifier_dropout
        self.max_position_embeddings = max_position_embeddings
        self.type_vocab_size = type_vocab_size
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        self.is_decoder = is_decoder
        self.pad_token_id = pad_token_id
        self.tie_word_embeddings = tie_word_embeddings
        super().__init__(pad_token_id=pad_token_id, tie_word_embeddings=tie_word_embeddings, **kwargs)
        self.is_decoder = is_decoder


def alibi_slopes(heads):
    """The paper's: 2^(-8i/n) for a power of two, else those of the next lower one and every second
    one of the next higher."""

    def geometric(n):
        return [2.0 ** (-8.0 * i / n) for i in range(1, n + 1)]

    lower = 2 ** int(math.log2(heads))
    return geometric(lower) + geometric(2 * lower)[0::2][: heads - lower]


class AlibiEmbeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids, token_type_ids=None):
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        return self.dropout(self.LayerNorm(x))


class AlibiSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = config.attention_probs_dropout_prob

    def forward(self, x, bias):
        batch, length, width = x.shape

        def heads(y):
            return y.view(batch, length, self.heads, width // self.heads).transpose(1, 2)

        y = nn.functional.scaled_dot_product_attention(
            heads(self.query(x)),
            heads(self.key(x)),
            heads(self.value(x)),
            attn_mask=bias,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return y.transpose(1, 2).reshape(batch, length, width)


class AlibiOutput(nn.Module):
    def __init__(self, config, inputs):
        super().__init__()
        self.dense = nn.Linear(inputs, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x, residual):
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class AlibiAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self = AlibiSelfAttention(config)
        self.output = AlibiOutput(config, config.hidden_size)

    def forward(self, x, bias):
        return self.output(self.self(x, bias), x)


class AlibiIntermediate(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x):
        return self.act(self.dense(x))


class AlibiLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention = AlibiAttention(config)
        self.intermediate = AlibiIntermediate(config)
        self.output = AlibiOutput(config, config.intermediate_size)

    def forward(self, x, bias):
        x = self.attention(x, bias)
        return self.output(self.intermediate(x), x)


class AlibiEncoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.layer = nn.ModuleList(AlibiLayer(config) for _ in range(config.num_hidden_layers))

    def bias(self, x, attention_mask):
        """[batch, heads, length, length]: distances times slopes, and -inf where nothing is seen."""
        length = x.shape[1]
        at = torch.arange(length, device=x.device)
        distance = at[None, :] - at[:, None]
        slopes = torch.tensor(alibi_slopes(self.config.num_attention_heads), device=x.device)
        bias = -slopes[:, None, None] * distance.abs()
        if self.config.is_decoder:
            bias = bias.masked_fill(distance > 0, float("-inf"))
        bias = bias[None].expand(x.shape[0], -1, -1, -1)
        if attention_mask is not None:
            bias = bias.masked_fill(attention_mask[:, None, None, :] == 0, float("-inf"))
        return bias.to(x.dtype)

    def forward(self, x, attention_mask=None):
        bias = self.bias(x, attention_mask)
        for layer in self.layer:
            x = layer(x, bias)
        return x


class AlibiPooler(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x):
        return torch.tanh(self.dense(x[:, 0]))


class AlibiPreTrainedModel(PreTrainedModel):
    config_class = AlibiConfig
    base_model_prefix = "alibi"

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(mean=0.0, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.data.zero_()
        if isinstance(module, nn.LayerNorm):
            module.bias.data.zero_()
            module.weight.data.fill_(1.0)
        if isinstance(module, AlibiPredictions):
            module.bias.data.zero_()


class AlibiModel(AlibiPreTrainedModel):
    def __init__(self, config, add_pooling_layer=True):
        super().__init__(config)
        self.embeddings = AlibiEmbeddings(config)
        self.encoder = AlibiEncoder(config)
        self.pooler = AlibiPooler(config) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value):
        self.embeddings.word_embeddings = value

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, **kwargs):
        x = self.encoder(self.embeddings(input_ids, token_type_ids), attention_mask)
        pooled = self.pooler(x) if self.pooler is not None else None
        return BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=pooled)


class AlibiTransform(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.act = ACT2FN[config.hidden_act]
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x):
        return self.LayerNorm(self.act(self.dense(x)))


class AlibiPredictions(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.transform = AlibiTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x):
        return self.decoder(self.transform(x)) + self.bias


class AlibiHead(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.predictions = AlibiPredictions(config)

    def forward(self, x):
        return self.predictions(x)


class AlibiForMaskedLM(AlibiPreTrainedModel):
    _tied_weights_keys = {"cls.predictions.decoder.weight": "alibi.embeddings.word_embeddings.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.alibi = AlibiModel(config, add_pooling_layer=False)
        self.cls = AlibiHead(config)
        self.post_init()

    def get_output_embeddings(self):
        return self.cls.predictions.decoder

    def set_output_embeddings(self, value):
        self.cls.predictions.decoder = value

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, labels=None, **kwargs):
        x = self.alibi(input_ids, attention_mask, token_type_ids).last_hidden_state
        logits = self.cls(x)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return MaskedLMOutput(loss=loss, logits=logits)


class AlibiForCausalLM(AlibiForMaskedLM):
    def forward(self, input_ids, attention_mask=None, token_type_ids=None, labels=None, **kwargs):
        logits = super().forward(input_ids, attention_mask, token_type_ids).logits
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            )
        return CausalLMOutput(loss=loss, logits=logits)


def head_dropout(config):
    if config.classifier_dropout is not None:
        return config.classifier_dropout
    return config.hidden_dropout_prob


class AlibiForSequenceClassification(AlibiPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.alibi = AlibiModel(config)
        self.dropout = nn.Dropout(head_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, labels=None, **kwargs):
        x = self.alibi(input_ids, attention_mask, token_type_ids).pooler_output
        logits = self.classifier(self.dropout(x))
        loss = None
        if labels is not None and self.config.num_labels == 1:
            loss = nn.functional.mse_loss(logits.flatten(), labels.flatten())
        elif labels is not None:
            loss = nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class AlibiForTokenClassification(AlibiPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.alibi = AlibiModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(head_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, labels=None, **kwargs):
        x = self.alibi(input_ids, attention_mask, token_type_ids).last_hidden_state
        logits = self.classifier(self.dropout(x))
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return TokenClassifierOutput(loss=loss, logits=logits)


class AlibiForQuestionAnswering(AlibiPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.alibi = AlibiModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(
        self,
        input_ids,
        attention_mask=None,
        token_type_ids=None,
        start_positions=None,
        end_positions=None,
        **kwargs,
    ):
        x = self.alibi(input_ids, attention_mask, token_type_ids).last_hidden_state
        start, end = self.qa_outputs(x).unbind(dim=-1)
        loss = None
        if start_positions is not None:
            loss = nn.functional.cross_entropy(start, start_positions) / 2
            loss = loss + nn.functional.cross_entropy(end, end_positions) / 2
        return QuestionAnsweringModelOutput(loss=loss, start_logits=start, end_logits=end)
