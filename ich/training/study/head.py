"""The sequence head of `context=study`: what a slice's study says of it.

Logits of a sequence of slices, and in one of its two forms their pooled features too, go through
layers of attention (Vaswani et al. 2017, arXiv 1706.03762) in which a pair of slices knows how many
places lie between them and nothing of where they are in the study: relative positions as a learned
bias (Raffel et al. 2020, arXiv 1910.10683, section 2.1), which begins as a preference for what is
near (Press et al. 2022, arXiv 2108.12409). What comes out is added to the slice logits averaged
over a slice and its two neighbours. It begins as zero, so that an untrained head is that average.

Not added to the slice's own logits: those of slices that the network was trained on leave next to
nothing to learn from their neighbours. docs/context.md has what both came to, and what a recurrent
head did.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

_WIDTH, _HEADS, _LAYERS = 64, 4, 2
_DROPOUT, _FEATURE_DROPOUT = 0.3, 0.5
_REACH = 16  # places; slices farther apart than this count as this far


class StudyHead(nn.Module):
    """Slices of studies -> their logits.

    Args:
        features: pooled features of a slice that it takes, F; 0 for a head over logits alone.
        labels: L.
    """

    def __init__(self, features: int, labels: int):
        super().__init__()
        self.features = features
        self.embed_logits = nn.Linear(labels, _WIDTH)
        if features:
            self.scale = nn.LayerNorm(features)
            self.feature_dropout = nn.Dropout(_FEATURE_DROPOUT)
            self.embed = nn.Linear(features, _WIDTH)
        self.dropout = nn.Dropout(_DROPOUT)
        self.layers = nn.ModuleList(_Layer() for _ in range(_LAYERS))
        self.norm = nn.LayerNorm(_WIDTH)
        self.out = nn.Linear(_WIDTH, labels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(
        self,
        features: torch.Tensor,
        logits: torch.Tensor,
        place: torch.Tensor,
        is_slice: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits of every slice, with its study in view.

        Args:
            features: float32 [B, T, F]; not looked at by a head over logits alone.
            logits: of the slice network, float32 [B, T, L].
            place: int64 [B, T], numbers of the slices' places along the normal.
            is_slice: bool [B, T], False for what pads a shorter sequence; None if nothing does.

        Returns:
            float32 [B, T, L].
        """
        # Logits of a sure network are far from 0, and no surer for it.
        x = self.embed_logits(torch.tanh(logits / 4))
        if self.features:
            x = x + self.embed(self.feature_dropout(self.scale(features)))
        x = self.dropout(x)
        apart = (place[:, None, :] - place[:, :, None]).clamp(-_REACH, _REACH) + _REACH
        for layer in self.layers:
            x = layer(x, apart, is_slice)
        out: torch.Tensor = _smoothed(logits, is_slice) + self.out(self.norm(x))
        return out


def _smoothed(logits: torch.Tensor, is_slice: torch.Tensor | None) -> torch.Tensor:
    """The mean of each slice's logits and those before and after it; an end stands for its
    neighbour."""
    # Padded, and not cut and joined: torch's exporters take a part of length 1 for a constant.
    padded = F.pad(logits.transpose(1, 2), (1, 1), mode="replicate").transpose(1, 2)
    before, after = padded[:, :-2], padded[:, 2:]
    if is_slice is not None:
        goes_on = torch.cat([is_slice[:, 1:], torch.zeros_like(is_slice[:, :1])], 1)
        after = torch.where(goes_on[..., None], after, logits)
    return (before + logits + after) / 3


class _Layer(nn.Module):
    """Attention over the sequence, then two linear layers; each added to what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp_norm = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)
        self.qkv = nn.Linear(_WIDTH, 3 * _WIDTH)
        self.project = nn.Linear(_WIDTH, _WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(_WIDTH, 2 * _WIDTH),
            nn.GELU(),
            nn.Dropout(_DROPOUT),
            nn.Linear(2 * _WIDTH, _WIDTH),
        )
        self.dropout = nn.Dropout(_DROPOUT)
        # Per distance and head; heads look from near by to nearly everywhere.
        distance = torch.arange(-_REACH, _REACH + 1).abs().float()
        slopes = 2.0 ** -torch.arange(_HEADS).float()
        self.bias = nn.Parameter(-distance[:, None] * slopes)

    def forward(
        self, x: torch.Tensor, apart: torch.Tensor, is_slice: torch.Tensor | None
    ) -> torch.Tensor:
        batch, slices, _ = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, slices, 3, _HEADS, _WIDTH // _HEADS)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        # Not torch's fused attention: it does not take a bias that is learned, and its exporters
        # lose the length of the sequence in it.
        score = query @ key.transpose(2, 3) * (_WIDTH // _HEADS) ** -0.5
        score = score + F.embedding(apart, self.bias).permute(0, 3, 1, 2)
        if is_slice is not None:
            score = score.masked_fill(~is_slice[:, None, None, :], float("-inf"))
        seen = (score.softmax(3) @ value).transpose(1, 2).reshape(batch, slices, _WIDTH)
        x = x + self.dropout(self.project(seen))
        out: torch.Tensor = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return out
