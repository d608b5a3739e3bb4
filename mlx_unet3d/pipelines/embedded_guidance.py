"""Guidance as an embedding: for networks that were distilled to be guided without a negative prompt."""

from __future__ import annotations

from typing import ClassVar

import mlx.core as mx

from ..layers.embeddings import guidance_embedding
from .components import Components


class EmbeddedGuidance(Components):
    """A pipeline whose UNet may take the guidance scale as an embedding (Luo et al. 2023, arXiv:2310.04378).

    A UNet with `time_cond_proj_dim` was trained with it, and then runs once a step at any scale.
    """

    embedded_scale_offset: ClassVar[float | None] = None
    """Added to `guidance_scale` before it is embedded; None in pipelines that embed none, as in diffusers."""

    @property
    def embeds_guidance(self) -> bool:
        """True if the UNet takes the guidance scale as an embedding: one pass a step, no negative prompt."""
        released = self.unet is None  # once its steps are done
        if self.embedded_scale_offset is None or released:
            return False
        return self.unet.config.get("time_cond_proj_dim") is not None

    def is_guided(self, guidance_scale: float | None = None) -> bool:
        """Return True if a run sees a negative prompt too: at a scale above 1 that is not embedded.

        None stands for the scale that the checkpoint recommends, or the pipeline's default.
        """
        return self.guidance_scale(guidance_scale) > 1 and not self.embeds_guidance

    def _guidance_embedding(self, guidance_scale: float, rows: int) -> mx.array:
        """-> (rows, time_cond_proj_dim) in fp32."""
        dim = self.unet.config.time_cond_proj_dim
        return guidance_embedding(guidance_scale + self.embedded_scale_offset, dim, rows)
