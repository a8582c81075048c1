"""Projector: one configuration of ``project``, checked once and used for many batches."""

from __future__ import annotations

from copy import copy
from typing import SupportsIndex

import torch
from torch import Tensor

from fastproj import checks, ops, torch_ops
from fastproj.backends import registry
from fastproj.call import Call
from fastproj.spec import MAX_ROWS


class Projector:
    """A reusable projection from ``grad_dim`` to ``proj_dim`` dimensions.

    ``projector.project(grads, model_id)`` is
    ``project(grads, proj_dim, seed, kind, stream=model_id, scale=scale, ...)``: each model_id
    (a checkpoint of an ensemble) has a matrix of its own.

    Parameters
    ----------
    grad_dim : P, the number of gradient entries per sample, 1 <= P <= 2^56.
    proj_dim : K, 1 <= K <= 2^32.
    seed, kind, block, scale, precision, backend : as in ``fastproj.project``.

    Raises
    ------
    TypeError, ValueError
        For a configuration that can't work here.
    """

    def __init__(
        self,
        grad_dim: SupportsIndex,
        proj_dim: SupportsIndex,
        seed: SupportsIndex = 0,
        kind: str = "rademacher",
        *,
        block: SupportsIndex | None = None,
        scale: str | float | None = "jl",
        precision: str | None = None,
        backend: str | None = None,
    ) -> None:
        self.grad_dim = checks.check_integer("Projector", "grad_dim", grad_dim, 1, MAX_ROWS + 1)
        self.proj_dim = checks.check_proj_dim("Projector", proj_dim)
        self.seed = checks.check_integer("Projector", "seed", seed, 0, 1 << 64)
        checks.check_kind("Projector", kind)
        self.block = checks.check_block("Projector", kind, block, self.proj_dim) or None
        checks.check_scale("Projector", scale, self.proj_dim)
        checks.check_precision("Projector", precision)
        checks.check_backend("Projector", backend)
        registry.check_usable(backend)
        self.kind = kind
        self.scale = scale
        self.precision = precision
        self.backend = backend

    def scaled(self, factor: float) -> Projector:
        """The same projector, with ``factor`` times its scale.

        Raises TypeError or ValueError where that is no finite number.
        """
        function = "Projector.scaled"
        block = self.block or 0
        made = copy(self)
        made.scale = checks.check_scale(function, factor, self.proj_dim) * checks.check_scale(
            function, self.scale, self.proj_dim, block
        )
        checks.check_scale(function, made.scale, self.proj_dim)
        return made

    def project(
        self,
        grads: checks.Grads,
        model_id: SupportsIndex = 0,
        *,
        row_offset: SupportsIndex | None = None,
        out: Tensor | None = None,
        accumulate: bool = False,
    ) -> Tensor:
        """``scale * G @ R[row_offset : row_offset + P]`` with the matrix of ``model_id``.

        Parameters
        ----------
        grads : Tensor [B, P], or a dict or sequence of [B, ...] tensors taken in order.
        model_id : the stream, 0 <= model_id < 2^32.
        row_offset : None where ``grads`` are whole gradients, P == grad_dim; an int where they are
            the piece row_offset .. row_offset + P of them.
        out, accumulate : as in ``fastproj.project``.

        Returns
        -------
        Tensor [B, proj_dim], float64 for float64 grads, float32 otherwise.

        Raises
        ------
        TypeError, ValueError
            For anything it can't take, before ``out`` is touched.
        """
        function = "Projector.project"
        call, backend = self._call(function, model_id, row_offset, accumulate)
        return ops.project_call(
            function,
            grads,
            self.proj_dim,
            call,
            backend,
            out=out,
            grad_dim=self.grad_dim,
            whole=row_offset is None,
        )

    def add_product(
        self,
        left: Tensor,
        right: Tensor,
        model_id: SupportsIndex = 0,
        *,
        row_offset: SupportsIndex,
        out: Tensor,
    ) -> bool:
        """Add the projection of the gradients left[b].T @ right[b] to ``out``, as they form.

        Parameters
        ----------
        left, right : Tensors [B, T, m] and [B, T, n], such as the gradients by a layer's output and
            its inputs. Their product [m, n], row by row, is a piece of the gradient.
        model_id, row_offset : as in ``project``.
        out : Tensor [B, proj_dim], float32.

        Returns
        -------
        False, with ``out`` untouched, where no kernel does this or none was asked for, and in a
        subclass with a ``project`` of its own: project the products then. See docs/triton.md for
        the kernel that does.

        Raises
        ------
        TypeError, ValueError
            Where one was asked for: for a model_id or row_offset that ``project`` doesn't take
            either, and for shapes or devices that don't go together.
        """
        function = "Projector.add_product"
        chosen = registry.for_products(self.backend)
        if chosen is None or getattr(self.project, "__func__", None) is not Projector.project:
            return False
        call, _ = self._call(function, model_id, row_offset, True)
        for name, t in (("left", left), ("right", right), ("out", out)):
            if not isinstance(t, Tensor):
                raise TypeError(
                    f"{function}: received {name} of type {type(t).__name__}; expected a Tensor"
                )
        if not left.dim() == right.dim() == 3 or left.shape[:2] != right.shape[:2]:
            raise ValueError(
                f"{function}: received left {list(left.shape)} and right {list(right.shape)}; "
                "expected [B, T, m] and [B, T, n]"
            )
        rows = left.shape[2] * right.shape[2]
        if call.row_offset + rows > self.grad_dim:
            raise ValueError(
                f"{function}: received row_offset={call.row_offset} and products with P={rows}; "
                f"expected row_offset + P <= grad_dim = {self.grad_dim}"
            )
        if out.shape != (len(left), self.proj_dim) or not left.device == right.device == out.device:
            raise ValueError(
                f"{function}: received out {list(out.shape)} on {out.device}, left on "
                f"{left.device} and right on {right.device}; expected out "
                f"{[len(left), self.proj_dim]}, all on one device"
            )
        return torch_ops.project_product(chosen, left, right, out, call)

    def _call(
        self,
        function: str,
        model_id: SupportsIndex,
        row_offset: SupportsIndex | None,
        accumulate: bool,
    ) -> tuple[Call, str]:
        start = 0
        if row_offset is not None:
            start = checks.check_integer(function, "row_offset", row_offset, 0, MAX_ROWS)
        key = checks.check_key(
            function, self.seed, self.kind, model_id, "model_id", block=self.block
        )
        call = Call(
            key,
            start,
            checks.check_scale(function, self.scale, self.proj_dim, key.block),
            checks.check_flag(function, "accumulate", accumulate),
            checks.check_precision(function, self.precision),
        )
        return call, checks.check_backend(function, self.backend)

    def project_transpose(
        self,
        y: Tensor,
        model_id: SupportsIndex = 0,
        *,
        rows: checks.Rows | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """The adjoint: ``scale * Y @ R[rows].T`` with the matrix of ``model_id``.

        Parameters
        ----------
        y : Tensor [B, proj_dim].
        rows : None for all grad_dim rows, an int for the first n, or a slice(start, stop).
        model_id, out : as in ``project``.

        Returns
        -------
        Tensor [B, n], float64 for float64 y, float32 otherwise.

        Raises
        ------
        TypeError, ValueError
            For anything it can't take, before ``out`` is touched.
        """
        function = "Projector.project_transpose"
        model_id = checks.check_integer(function, "model_id", model_id, 0, checks.MAX_STREAM)
        if isinstance(y, Tensor) and y.dim() == 2 and y.shape[1] != self.proj_dim:
            raise ValueError(
                f"{function}: received y with K={y.shape[1]}; "
                f"expected K = proj_dim = {self.proj_dim}"
            )
        return ops.project_transpose(
            y,
            self._rows(function, rows),
            self.seed,
            self.kind,
            block=self.block,
            stream=model_id,
            scale=self.scale,
            out=out,
            precision=self.precision,
            backend=self.backend,
        )

    def matrix(
        self,
        rows: checks.Rows | None = None,
        cols: checks.Rows | None = None,
        model_id: SupportsIndex = 0,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """The block ``R[rows, cols]`` of the matrix of ``model_id``, unscaled.

        ``rows`` and ``cols`` are an int n for the first n or a slice(start, stop), and default to
        all grad_dim rows and all proj_dim columns. All else is as in ``fastproj.matrix``.
        """
        function = "Projector.matrix"
        model_id = checks.check_integer(function, "model_id", model_id, 0, checks.MAX_STREAM)
        return ops.matrix(
            self._rows(function, rows),
            self.proj_dim if cols is None else cols,
            self.seed,
            self.kind,
            block=self.block,
            stream=model_id,
            dtype=dtype,
            device=device,
            backend=self.backend,
        )

    def _rows(self, function: str, rows: checks.Rows | None) -> checks.Rows:
        """``rows`` or all of them; a ValueError where they go past grad_dim."""
        if rows is None:
            return self.grad_dim
        checks.check_rows(function, "rows", rows, self.grad_dim)
        return rows

    def __repr__(self) -> str:
        block = f", block={self.block}" if self.block else ""
        return (
            f"Projector(grad_dim={self.grad_dim}, proj_dim={self.proj_dim}, seed={self.seed}, "
            f"kind={self.kind!r}{block}, scale={self.scale!r}, precision={self.precision!r}, "
            f"backend={self.backend!r})"
        )
