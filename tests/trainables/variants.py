"""Forms of the zoo that the tests try besides the defaults: module -> name -> overrides."""

from collections.abc import Mapping

_RNN_SMALL = {"width": 32, "encoder_units": 32}

RNN: Mapping[str, Mapping[str, object]] = {
    "lstm": _RNN_SMALL,
    "gru": {**_RNN_SMALL, "cell": "gru", "tie": "none"},
    "bridge": {**_RNN_SMALL, "encoder_units": 20, "bidirectional": True, "decoder_layers": 2},
    "gru_two_way": {**_RNN_SMALL, "cell": "gru", "encoder_units": 16, "bidirectional": True},
    "deep": {**_RNN_SMALL, "encoder_layers": 2, "decoder_layers": 2, "reverse_source": True},
    "layer_norm": {**_RNN_SMALL, "encoder_layers": 2, "layer_norm": True},
}

_ATTENTION_RNN_SMALL = {"width": 32, "encoder_units": 16}

_ATTENTION_RNN_DEEP = {**_ATTENTION_RNN_SMALL, "encoder_layers": 3, "decoder_layers": 2}

ATTENTION_RNN: Mapping[str, Mapping[str, object]] = {
    "lstm": _ATTENTION_RNN_SMALL,
    "gru": {**_ATTENTION_RNN_SMALL, "cell": "gru", "tie": "none"},
    "one_way": {**_ATTENTION_RNN_SMALL, "bidirectional": False, "decoder_layers": 2},
    "feeding": {**_ATTENTION_RNN_SMALL, "input_feeding": True},
    "gru_feeding": {
        **_ATTENTION_RNN_SMALL,
        "input_feeding": True,
        "cell": "gru",
        "decoder_layers": 2,
    },
    "bahdanau": {
        **_ATTENTION_RNN_SMALL,
        "order": "bahdanau",
        "score": "additive",
        "encoder_units": 20,
    },
    "gru_bahdanau": {
        **_ATTENTION_RNN_SMALL,
        "order": "bahdanau",
        "cell": "gru",
        "layer_norm": True,
    },
    "additive": {**_ATTENTION_RNN_SMALL, "score": "additive"},
    "cosine": {**_ATTENTION_RNN_SMALL, "score": "cosine", "input_feeding": True},
    "dot": {**_ATTENTION_RNN_SMALL, "score": "dot"},
    "scaled_dot": {**_ATTENTION_RNN_SMALL, "score": "scaled_dot", "input_feeding": True},
    "layer_norm": {**_ATTENTION_RNN_DEEP, "layer_norm": True, "input_feeding": True},
    "deep": _ATTENTION_RNN_DEEP,
    "pyramid_conv": {**_ATTENTION_RNN_DEEP, "subsampling.kind": "conv"},
    "pyramid_pool": {**_ATTENTION_RNN_DEEP, "subsampling.kind": "pool", "subsampling.factor": 3},
    "pyramid_concat": {**_ATTENTION_RNN_DEEP, "subsampling.kind": "concat", "cell": "gru"},
}

_CONV_SMALL = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2}

CONV: Mapping[str, Mapping[str, object]] = {
    "small": _CONV_SMALL,
    "wide_window": {**_CONV_SMALL, "kernel": 5},
    "even_window": {**_CONV_SMALL, "kernel": 4, "decoder_layers": 3, "max_positions": 256},
    "no_window": {**_CONV_SMALL, "kernel": 1, "encoder_layers": 1},
    "plain_weights": {**_CONV_SMALL, "weight_norm": False, "positions": "none", "tie": "none"},
    "characters": {
        **_CONV_SMALL,
        "embedding": {"kind": "characters", "character_features": 16, "filters": 16},
    },
    "subsampled_conv": {**_CONV_SMALL, "subsampling": {"kind": "conv"}},
    "subsampled_pool": {**_CONV_SMALL, "subsampling": {"kind": "pool", "pool": "max", "layers": 1}},
    "subsampled_concat": {**_CONV_SMALL, "subsampling": {"kind": "concat"}},
}

_TRANSFORMER_SMALL = {"d_model": 32, "d_ff": 64, "encoder_layers": 2, "decoder_layers": 2}

TRANSFORMER: Mapping[str, Mapping[str, object]] = {
    "pre": _TRANSFORMER_SMALL,
    "post": {**_TRANSFORMER_SMALL, "norm": "post"},
    "untied": {**_TRANSFORMER_SMALL, "tie": "none", "num_heads": 2, "head_dim": 10},
    "all_tied": {**_TRANSFORMER_SMALL, "tie": "all"},
    "gated": {**_TRANSFORMER_SMALL, "concrete_heads": ["enc_self", "dec_self", "dec_enc"]},
    "pruned": {
        **_TRANSFORMER_SMALL,
        "norm": "post",
        "alive_heads": {
            "enc_self": [[0, 0, 0, 0], [1, 0, 1, 1]],
            "dec_self": [[0, 1, 0, 0], [0, 0, 0, 0]],
            "dec_enc": [[1, 1, 1, 1], [0, 0, 0, 1]],
        },
    },
    "pruned_pre": {**_TRANSFORMER_SMALL, "alive_heads": {"dec_self": [[0, 0, 0, 0], [0, 1, 1, 0]]}},
    "learned": {
        **_TRANSFORMER_SMALL,
        "positions": "learned",
        "max_positions": 64,
        "inp_emb_bias": True,
    },
    "one_hot": {**_TRANSFORMER_SMALL, "positions": "one_hot", "rescale_emb": False},
    "no_positions": {**_TRANSFORMER_SMALL, "positions": "none"},
    "gelu": {**_TRANSFORMER_SMALL, "activation": "gelu"},
    "swiglu": {**_TRANSFORMER_SMALL, "activation": "swiglu"},
    "geglu_post": {**_TRANSFORMER_SMALL, "activation": "geglu", "norm": "post"},
    # In evaluation mode they keep every row of the suite; nn/norms.py lists which fail in training.
    "batch_norm": {**_TRANSFORMER_SMALL, "norm_kind": "batch"},
    "power_norm": {**_TRANSFORMER_SMALL, "norm_kind": "power"},
    # At rank 4 of 8, three seeds left 1, 2 and 0 of 60 reversals wrong; at 6 none.
    "low_rank": {**_TRANSFORMER_SMALL, "values": "low_rank", "value_rank": 6},
    "low_rank_pruned": {
        **_TRANSFORMER_SMALL,
        "values": "low_rank",
        "alive_heads": {"enc_self": [[0, 0, 0, 0], [1, 0, 1, 1]], "dec_enc": [[1, 1, 0, 1]] * 2},
    },
    "value_free": {**_TRANSFORMER_SMALL, "values": "none", "head_dim": 6},
    "value_free_gated": {
        **_TRANSFORMER_SMALL,
        "values": "none",
        "concrete_heads": ["enc_self", "dec_enc"],
    },
    "value_free_pruned": {
        **_TRANSFORMER_SMALL,
        "values": "none",
        "alive_heads": {"dec_self": [[0, 1, 0, 0], [0, 0, 0, 0]], "dec_enc": [[1, 0, 0, 1]] * 2},
    },
    "subsampled_conv": {**_TRANSFORMER_SMALL, "subsampling": {"kind": "conv", "layers": 1}},
    "subsampled_pool": {**_TRANSFORMER_SMALL, "subsampling": {"kind": "pool"}, "norm": "post"},
    "subsampled_concat": {
        **_TRANSFORMER_SMALL,
        "subsampling": {"kind": "concat", "factor": 3, "layers": 1},
    },
    "characters": {
        **_TRANSFORMER_SMALL,
        "embedding": {
            "kind": "characters",
            "character_features": 8,
            "widths": [1, 2, 3],
            "filters": 8,
        },
    },
}

FORMS: Mapping[str, Mapping[str, Mapping[str, object]]] = {
    "rnn": RNN,
    "attention_rnn": ATTENTION_RNN,
    "conv": CONV,
    "transformer": TRANSFORMER,
}
