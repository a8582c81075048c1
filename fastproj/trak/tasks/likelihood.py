"""The likelihood of the labels: its gradient, and the rows that its Fisher matrix is made of.

For logits z with probabilities p, label y and J = dz / d theta, the Fisher matrix of a prediction,
which is the Gauss-Newton matrix of its cross-entropy loss, is J^T (diag p - p p^T) J. With
p = p_y, q = 1 - p and pi the probabilities of the other classes, over q,

    diag p - p p^T = p q (e_y - pi) (e_y - pi)^T + q (diag pi - pi pi^T)

The first part is along the gradient of the log-odds f = log(p / q), since df/dz = e_y - pi. The
second is the expectation of ``q (e_c - pi) (e_c - pi)^T`` over a class c drawn from pi. So a sample
gives one row exactly and one by drawing. (To draw y itself from p would also be unbiased, but of a
network that fits its labels a rare draw with a huge gradient would be most of the matrix.)

Where rows are drawn, the empirical Fisher matrix, ``q^2 (e_y - pi) (e_y - pi)^T``, is added, which
costs nothing. The two are equal in expectation where the labels are as the network says. (Of the
mean over T predictions it is 1 / T of the other, of CLIP half; with a likelihood temperature other
than 1 it is another matrix.) With it, what the sketch and the draws leave of noise is less, and the
choice of lambda matters less (docs/research/lambda.md).

Samples of several predictions (tokens) share a drawn row. Each part of each prediction has a random
sign, so that the products of different ones cancel in expectation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastproj.trak.tasks.base import Terms
from fastproj.trak.tasks.contrasts import contrasts

UNIFORM, OWN_SIGN, OTHER_SIGN = range(3)  # of the last dimension of noise


def class_terms(logits: Tensor, labels: Tensor, noise: Tensor) -> Terms:
    """One class of each sample; logits [B, C], labels [B], noise [B, d, 1, 3].

    For two classes there is one other, and nothing to draw.
    """
    two = logits.shape[-1] == 2
    draws = 0 if two else noise.shape[1]
    found = contrasts(logits, labels, noise[:, :draws, 0, UNIFORM])
    own, rest, mean, others = found.own, found.rest, found.mean, found.drawn
    f = own - rest
    q, p = torch.sigmoid(-f.detach()), torch.sigmoid(f.detach())
    scale = (q / max(draws, 1)).sqrt().unsqueeze(-1)
    drawn = scale * (others - mean.unsqueeze(-1))
    curvature = p * q if two else q  # p q + q^2
    return Terms(f, q, curvature, (own - mean).detach(), drawn)


def prediction_terms(
    logits: Tensor, labels: Tensor, weights: Tensor, noise: Tensor, temperature: float = 1.0
) -> Terms:
    """Several predictions of each sample, whose log-likelihoods count ``weights``.

    logits [B, T, C], labels [B, T], weights [B, T] (0: not there), noise [B, d, T, 3]. The first
    prediction that is there takes the first numbers of the noise, wherever it stands: padding may
    come before it, as much as the other samples of a batch need.

    The output is the log-likelihood of the labels under logits / temperature, times temperature:
    its slope by a logit is p or p - 1 of the softer softmax. The curvature is that of the logits.
    """
    there = weights > 0
    labels = torch.where(there, labels, 0)
    number = (there.cumsum(1) - 1).clamp(min=0)  # [B, T]
    noise = noise.gather(2, number[:, None, :, None].expand_as(noise))
    found = contrasts(logits, labels, noise[..., UNIFORM].mT, temperature)
    own, rest, mean, soft, soft_mean, others = found  # [B, T], and [B, T, d]
    weights, noise = weights.to(own.dtype), noise.to(own.dtype)
    f = own - rest
    q, p = torch.sigmoid(-f.detach()), torch.sigmoid(f.detach())
    softer = (own - soft) / temperature  # the log-odds of logits / temperature
    log_p = temperature * log_sigmoid(softer)
    of_own = (weights * p * q).sqrt().unsqueeze(-1) * noise[..., OWN_SIGN].mT  # [B, T, d]
    of_other = (weights * q).sqrt().unsqueeze(-1) * noise[..., OTHER_SIGN].mT
    rows = of_own * (own - mean).unsqueeze(-1) + of_other * (others - mean.unsqueeze(-1))
    drawn = torch.where(there.unsqueeze(-1), rows, 0.0).sum(1) / max(noise.shape[1], 1) ** 0.5
    slope = weights * torch.sigmoid(-softer.detach())
    along = torch.where(there, slope * (own.detach() - soft_mean), 0.0).sum(1)
    output = torch.where(there, weights * log_p, 0.0).sum(1)
    return Terms(output, torch.ones_like(along), torch.ones_like(along), along, drawn)


def log_odds_terms(log_odds: Tensor, noise: Tensor) -> Terms:
    """Yes-or-no predictions; log_odds [B, L] of the right answers, noise [B, d, L, 3].

    One of them is its own row; several share drawn ones.
    """
    f = at_least_single(log_odds)
    q, p = torch.sigmoid(-f.detach()), torch.sigmoid(f.detach())
    if f.shape[1] == 1:
        q = q[:, 0]
        return Terms(f[:, 0], q, q * p[:, 0], f[:, 0].detach(), f.new_zeros(len(f), 0))
    signs = noise[..., OWN_SIGN].to(f.dtype)  # [B, d, L]
    rows = signs * ((p * q).sqrt() * f).unsqueeze(1)
    drawn = rows.sum(-1) / max(noise.shape[1], 1) ** 0.5
    along = (q * f.detach()).sum(1)
    output = log_sigmoid(f).sum(1)
    return Terms(output, torch.ones_like(along), torch.ones_like(along), along, drawn)


def log_sigmoid(f: Tensor) -> Tensor:
    """As PyTorch's, whose backward vmap has no rule for."""
    return -F.softplus(-f, threshold=40)  # from there on it is linear to float64


def at_least_single(logits: Tensor) -> Tensor:
    """Logits in float32 or more: sums over classes and tokens are not for 16 bits."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
