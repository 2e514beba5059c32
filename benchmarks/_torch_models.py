"""Torch counterparts of models: the same losses and parameters, in torch's layers.

A counterpart is a module that takes the batch and gives the losses of its examples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def tensor(x: Any) -> Tensor:
    """A copy of an array."""
    copied = torch.tensor(np.asarray(x))
    return copied if copied.is_floating_point() else copied.long()


def _filled(layer: nn.Module, **parameters: Any) -> nn.Module:
    layer.load_state_dict({name: tensor(x) for name, x in parameters.items()})
    return layer


def _linear(w: Any) -> nn.Module:
    return _filled(nn.Linear(*w.shape, bias=False), weight=w.T)


def _dense(p: Any) -> nn.Module:
    return _filled(nn.Linear(*p["w"].shape), weight=p["w"].T, bias=p["b"])


def _embedding(w: Any) -> nn.Module:
    return _filled(nn.Embedding(*w.shape), weight=w)


def _layer_norm(p: Any) -> nn.Module:
    return _filled(nn.LayerNorm(len(p["scale"])), weight=p["scale"], bias=p["bias"])


def _conv(p: Any) -> nn.Module:
    height, width, channels, filters = p["w"].shape
    layer = nn.Conv2d(
        channels, filters, (height, width), padding=(height // 2, width // 2)
    )
    return _filled(layer, weight=p["w"].transpose(3, 2, 0, 1), bias=p["b"])


def _recurrent(
    kind: type[nn.RNNBase], w_x: Any, w_h: Any, b_x: Any, b_h: Any = None
) -> nn.RNNBase:
    """Torch has two biases; where there is one, the other is zero and stays so."""
    layer = kind(w_x.shape[0], w_h.shape[0], batch_first=True)
    b = np.zeros_like(b_x) if b_h is None else b_h
    _filled(layer, weight_ih_l0=w_x.T, weight_hh_l0=w_h.T, bias_ih_l0=b_x, bias_hh_l0=b)
    layer.bias_hh_l0.requires_grad_(b_h is not None)
    return layer


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    losses = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
    return losses.reshape(len(labels), -1).mean(1)


# --------------------------------------------------------------------------------------


class MLP(nn.Module):
    """Counterpart of `mlp`."""

    def __init__(self, params: Any):
        super().__init__()
        self.layers = nn.ModuleList(map(_dense, params))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        *hidden, last = self.layers
        for layer in hidden:
            x = F.relu(layer(x))
        return _cross_entropy(last(x), label)


class TaskHeads(nn.Module):
    """Counterpart of `task_heads`."""

    def __init__(self, params: Any):
        super().__init__()
        self.trunk = nn.ModuleList(map(_dense, params["trunk"]))
        self.hidden = nn.ModuleList(_dense(p["hidden"]) for p in params["heads"])
        self.out = nn.ModuleList(_dense(p["out"]) for p in params["heads"])

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        for layer in self.trunk:
            x = _gelu(layer(x))
        heads = zip(self.hidden, self.out, labels.unbind(1), strict=True)
        return sum(
            _cross_entropy(out(torch.tanh(hid(x))), label) for hid, out, label in heads
        )


class DeepSets(nn.Module):
    """Counterpart of `deep_sets`."""

    def __init__(self, params: Any, groups: int = 8):
        super().__init__()
        self.inner = nn.ModuleList(map(_dense, params["inner"]))
        self.outer, self.out, self.groups = (
            _dense(params["outer"]),
            _dense(params["out"]),
            groups,
        )

    def forward(self, x: Tensor, group: Tensor, label: Tensor) -> Tensor:
        for layer in self.inner:
            x = F.relu(layer(x))
        zeros = x.new_zeros(len(x), self.groups, x.shape[-1])
        x = zeros.scatter_add(1, group[..., None].expand(x.shape), x) / 8
        return _cross_entropy(self.out(F.relu(self.outer(x)).mean(1)), label)


class Recurrent(nn.Module):
    """A recurrent net whose last state is classified."""

    def __init__(self, cell: nn.RNNBase, out: nn.Module):
        super().__init__()
        self.cell, self.out = cell, out

    def forward(self, xs: Tensor, label: Tensor) -> Tensor:
        states, _ = self.cell(xs)
        return _cross_entropy(self.out(states[:, -1]), label)


def rnn(p: Any) -> nn.Module:
    return Recurrent(_recurrent(nn.RNN, p["in"], p["rec"], p["b"]), _linear(p["out"]))


def lstm(p: Any) -> nn.Module:
    w, b = np.asarray(p["cell"]["w"]), np.asarray(p["cell"]["b"])
    units = len(b) // 4
    forget = np.repeat(
        np.float32([0, 1, 0, 0]), units
    )  # the 1 that the model adds in its loss
    cell = _recurrent(nn.LSTM, w[:-units], w[-units:], b + forget)
    return Recurrent(cell, _dense(p["out"]))


def gru(p: Any) -> nn.Module:
    inputs, states = p["in"], p["rec"]
    cell = _recurrent(nn.GRU, inputs["w"], states["w"], inputs["b"], states["b"])
    return Recurrent(cell, _dense(p["out"]))


class EmbeddingBag(nn.Module):
    """Counterpart of `embedding_bag`."""

    def __init__(self, params: Any):
        super().__init__()
        self.embed = _embedding(params["embed"])
        self.hidden, self.out = _linear(params["hidden"]), _linear(params["out"])

    def forward(self, words: Tensor, label: Tensor) -> Tensor:
        return _cross_entropy(
            self.out(F.relu(self.hidden(self.embed(words).mean(1)))), label
        )


class NextWord(nn.Module):
    """Counterpart of `next_word`."""

    def __init__(self, params: Any):
        super().__init__()
        self.embed, self.hidden = _embedding(params["embed"]), _dense(params["hidden"])
        self.out = _linear(params["out"])

    def forward(self, words: Tensor, label: Tensor) -> Tensor:
        x = torch.tanh(self.hidden(self.embed(words).flatten(1)))
        return _cross_entropy(self.out(x), label)


class Block(nn.Module):
    """A layer of a transformer."""

    def __init__(self, p: Any, heads: int = 4):
        super().__init__()
        self.norm1, self.norm2, self.heads = (
            _layer_norm(p["norm1"]),
            _layer_norm(p["norm2"]),
            heads,
        )
        self.qkv, self.out = _linear(p["qkv"]), _linear(p["out"])
        self.up, self.down = _dense(p["up"]), _dense(p["down"])

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(_gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Counterpart of `transformer` with a list of layers, or with a tied weight."""

    def __init__(self, params: Any):
        super().__init__()
        self.embed, self.positions = (
            _embedding(params["embed"]),
            _embedding(params["positions"]),
        )
        self.layers = nn.ModuleList(map(Block, params["layers"]))
        self.norm = _layer_norm(params["norm"])
        self.unembed = _linear(params["unembed"]) if "unembed" in params else None

    def forward(self, tokens: Tensor) -> Tensor:
        words = tokens[:, :-1].contiguous()  # Opacus asks for it
        # positions for each example, for by their first axis Opacus tells examples
        # apart
        x = self.embed(words) + self.positions(
            torch.arange(words.shape[1]).repeat(len(words), 1)
        )
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        if self.unembed is None:
            logits = x @ (self.embed.weight.T * x.shape[-1] ** -0.5)
        else:
            logits = self.unembed(x)
        return _cross_entropy(logits, tokens[:, 1:])


class ConvNet(nn.Module):
    """Counterpart of `small_conv_net`, with channels before height and width.

    Opacus gives wrong rows, without a word, of convolutions of images that lie in
    memory with their channels last. So they are laid out anew.
    """

    def __init__(self, params: Any, shape: tuple[int, int, int] = (7, 7, 32)):
        super().__init__()
        self.convs = nn.ModuleList(map(_conv, params["convs"]))
        w, b = np.asarray(params["hidden"]["w"]), params["hidden"]["b"]
        w = w.reshape(*shape, -1).transpose(2, 0, 1, 3).reshape(w.shape)
        self.hidden, self.out = _dense({"w": w, "b": b}), _dense(params["out"])

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)
        for layer in self.convs:
            x = F.max_pool2d(F.relu(layer(x)), 2)
        return _cross_entropy(self.out(F.relu(self.hidden(x.flatten(1)))), label)


class MixerLayer(nn.Module):
    """A layer of a mixer."""

    def __init__(self, p: Any):
        super().__init__()
        self.norm1, self.norm2 = _layer_norm(p["norm1"]), _layer_norm(p["norm2"])
        self.rows1, self.rows2 = _linear(p["rows1"].T), _linear(p["rows2"].T)
        self.up, self.down = _dense(p["up"]), _dense(p["down"])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.rows2(_gelu(self.rows1(self.norm1(x).transpose(1, 2)))).transpose(
            1, 2
        )
        return x + self.down(_gelu(self.up(self.norm2(x))))


class Mixer(nn.Module):
    """Counterpart of `mixer`."""

    def __init__(self, params: Any):
        super().__init__()
        self.patch, self.out = _dense(params["patch"]), _dense(params["out"])
        self.layers = nn.Sequential(*map(MixerLayer, params["layers"]))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return _cross_entropy(self.out(self.layers(self.patch(x)).mean(1)), label)


COUNTERPARTS: dict[str, Callable[[Any], nn.Module]] = {  # by family
    "mlp": MLP,
    "task_heads": TaskHeads,
    "deep_sets": DeepSets,
    "rnn": rnn,
    "lstm": lstm,
    "gru": gru,
    "embedding_bag": EmbeddingBag,
    "next_word": NextWord,
    "transformer": Transformer,
    "transformer tied": Transformer,
    "small_conv_net": ConvNet,
    "mixer": Mixer,
}
