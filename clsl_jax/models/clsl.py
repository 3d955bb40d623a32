"""The CLSL network: backbone, encoder, label graph, SRFL, SGFE and the global branch.

Source: CLSL, arXiv 2510.10055.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from clsl_jax.models.alignment import FeatureEnhancement
from clsl_jax.models.encoder import TORCH_LINEAR_INIT, Encoder
from clsl_jax.models.graph import LabelGraph
from clsl_jax.models.resnet import build_backbone
from clsl_jax.models.semantic import SemanticFeatures

Outputs = dict[str, Any]
Blend = Callable[[jax.Array], Sequence[jax.Array]]


def softmax_pool(position_logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each class's logits [B, P, C] weighted by their own softmax over positions.

    Returns:
      (logits [B, C], weights [B, P, C]), float32.
    """
    weights = jax.nn.softmax(position_logits, 1)
    return jnp.sum(weights * position_logits, 1), weights


class ClassDot(nn.Module):
    """A linear classifier of its own for each class: z_c = w_c . v_c + b_c, float32."""

    @nn.compact
    def __call__(self, semantic: jax.Array) -> jax.Array:
        """semantic [B, C, D] -> logits [B, C]."""
        _, c, d = semantic.shape
        init = nn.initializers.variance_scaling(
            1.0 / 3.0, "fan_in", "uniform", in_axis=1, out_axis=0
        )
        kernel = self.param("kernel", init, (c, d), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (c,), jnp.float32)
        return jnp.einsum("bcd,cd->bc", semantic.astype(jnp.float32), kernel) + bias


class CLSLHead(nn.Module):
    """Everything after the backbone.

    Which parts exist decides what the logits are:
      sgfe on: softmax-pooled position logits of SGFE, fed v (srfl on) or the label embeddings, plus
        those of a 1x1 convolution with position_residual;
      sgfe off, srfl on: z_c = w_c . v_c + b_c;
      both off: a 1x1 convolution of the features with softmax pooling (the baseline).
    The authors' variants: 'clsl' all on; 'without_recovery' global_branch off; 'without_srfl' srfl
    and global_branch off; 'baseline' encoder_layers 0 and all three off.

    Attributes:
      num_classes: C.
      encoder_layers, encoder_heads, encoder_mlp, encoder_dropout, encoder_norm_first,
        encoder_final_norm, positions: the transformer encoder; 0 layers leave it out.
      srfl, sgfe, global_branch: which parts exist.
      position_residual: adds a 1x1 convolution of the features to SGFE's position logits, which
        start at 0; not in the paper. From random weights a head without it takes many more epochs
        to learn where to look (docs/study-details.md). Nothing without sgfe.
      graph_layers: graph convolutions on the label embeddings; 0 is as if there were none. Nothing
        is built where no part uses label embeddings.
      rank: of SGFE's attention.
      attention_kernel: on a CUDA GPU, SGFE's attention by `models/attention_kernel.py`.
      head_dropout: rate in SGFE's MLP.
      dtype: compute type; parameters, softmaxes, norms and logits are float32.
      remat: the backward pass computes the inside of each residual and encoder block again instead
        of keeping it.
      place: applied to the features; says where they lie on the devices. None leaves that open.
    """

    num_classes: int
    encoder_layers: int = 1
    encoder_heads: int = 8
    encoder_mlp: int = 2048
    encoder_dropout: float = 0.1
    encoder_norm_first: bool = False
    encoder_final_norm: bool = False
    positions: bool = True
    srfl: bool = True
    sgfe: bool = True
    global_branch: bool = True
    position_residual: bool = False
    graph_layers: int = 0
    rank: int = 1024
    attention_kernel: bool = False
    head_dropout: float = 0.5
    dtype: Any = jnp.float32
    remat: bool = False
    place: Callable[[jax.Array], jax.Array] | None = None

    @nn.compact
    def __call__(
        self,
        features: jax.Array,
        embeddings: jax.Array | None = None,
        adjacency: jax.Array | None = None,
        *,
        train: bool,
        blend: Blend | None = None,
    ) -> tuple[jax.Array, Outputs]:
        """Logits of the semantic-aware branch, and every intermediate.

        Args:
          features: [B, h, w, D], a backbone's output.
          embeddings: label embeddings [C, E]; may be None where no part uses them.
          adjacency: normalised adjacency [C, C], needed with graph_layers > 0.
          train: batch statistics in norms (collection `batch_stats` mutable) and dropout (rng
            'dropout') instead of inference.
          blend: gives other semantic features [B, C, D] for those of the images; needs srfl.

        Returns:
          (logits [B, C] float32, out). `out` holds, None where the part is off:
            grid: (h, w), with P = h * w positions, row by row;
            backbone_features [B, P, D]; features [B, P, D], after the encoder;
            label_nodes [C, E], after the graph; semantic_features v [B, C, D];
            attention_logits and attention (softmax over classes) [B, P, C];
            enhanced_features f [B, P, S], S the width of what SGFE is fed; position_logits s and
            position_weights (softmax over positions) [B, P, C]; semantic_logits [B, C], the logits
            again;
            global_positions [B, P, C], global_logits [B, C], their maximum;
            blended_logits, a tuple of [B, C] for what `blend` gives.

        Raises:
          ValueError: the embeddings are not [C, E], or an adjacency is missing.
        """
        b, h, w, d = features.shape
        if self.place is not None:
            features = self.place(features)
        x = Encoder(
            layers=self.encoder_layers,
            heads=self.encoder_heads,
            mlp=self.encoder_mlp,
            dropout=self.encoder_dropout,
            norm_first=self.encoder_norm_first,
            final_norm=self.encoder_final_norm,
            positions=self.positions,
            remat=self.remat,
            dtype=self.dtype,
            name="encoder",
        )(features, train=train)
        out: Outputs = dict.fromkeys(
            (
                "label_nodes",
                "semantic_features",
                "attention_logits",
                "attention",
                "enhanced_features",
                "position_logits",
                "position_weights",
                "global_positions",
                "global_logits",
                "blended_logits",
            )
        )
        out.update(grid=(h, w), backbone_features=features.reshape(b, h * w, d), features=x)

        semantic = None
        if self.srfl or self.sgfe:
            semantic = out["label_nodes"] = self._label_nodes(embeddings, adjacency)
        if self.srfl:
            semantic = out["semantic_features"] = SemanticFeatures(self.dtype, name="semantic")(
                x, semantic, train=train
            )
        classify = self._classifier(x, train=train)
        logits, parts = classify(semantic)
        out.update(parts)
        if blend is not None:
            out["blended_logits"] = tuple(classify(other)[0] for other in blend(semantic))
        if self.global_branch:
            out["global_positions"] = self._pointwise("global_branch")(x.astype(jnp.float32))
            out["global_logits"] = jnp.max(out["global_positions"], 1)
        out["semantic_logits"] = logits
        return logits, out

    def _classifier(
        self, x: jax.Array, *, train: bool
    ) -> Callable[[jax.Array | None], tuple[jax.Array, Outputs]]:
        """Returns what makes semantic features into (logits [B, C], intermediates)."""
        pooled = None
        if self.sgfe:
            enhancement = FeatureEnhancement(
                self.rank,
                self.head_dropout,
                self.dtype,
                starts_at_zero=self.position_residual,
                attention_kernel=self.attention_kernel,
                name="enhancement",
            )
        elif self.srfl:
            classifier = ClassDot(name="classifier")
            return lambda semantic: (classifier(semantic), {})
        if not self.sgfe or self.position_residual:
            pooled = self._pointwise("pooled")

        def classify(semantic: jax.Array | None) -> tuple[jax.Array, Outputs]:
            positions, out = None, {}
            if self.sgfe:
                positions, out = enhancement(x, semantic, train=train)
            if pooled is not None:
                local = pooled(x.astype(jnp.float32))
                positions = local if positions is None else positions + local
            logits, weights = softmax_pool(positions)
            return logits, out | {"position_logits": positions, "position_weights": weights}

        return classify

    def _label_nodes(self, embeddings: jax.Array | None, adjacency: jax.Array | None) -> jax.Array:
        """Label embeddings [C, E] after the graph."""
        c = self.num_classes
        if embeddings is None or embeddings.ndim != 2 or embeddings.shape[0] != c:
            found = "missing" if embeddings is None else embeddings.shape
            raise ValueError(f"label embeddings are {found}, expected ({c}, E): a row per class.")
        return LabelGraph(self.graph_layers, self.dtype, name="graph")(embeddings, adjacency)

    def _pointwise(self, name: str) -> nn.Dense:
        """A 1x1 convolution of [B, P, D] to logits [B, P, C], float32."""
        return nn.Dense(
            self.num_classes, dtype=jnp.float32, kernel_init=TORCH_LINEAR_INIT, name=name
        )


class CLSL(CLSLHead):
    """A backbone in front of the head; its variables stand beside the head's, under 'backbone'.

    Attributes:
      backbone: a name that `build_backbone` knows.
      backbone_widths: instead of the named network's own, mostly for 'small'.
      freeze_backbone: the backbone always works as in inference and takes no gradient.
      The others: as in `CLSLHead`; dtype holds for both.
    """

    backbone: str = "resnet101"
    backbone_widths: Sequence[int] | None = None
    freeze_backbone: bool = False

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        embeddings: jax.Array | None = None,
        adjacency: jax.Array | None = None,
        *,
        train: bool,
        blend: Blend | None = None,
    ) -> tuple[jax.Array, Outputs]:
        """images [B, H, W, 3] float32, normalised -> (logits [B, C], out), as `CLSLHead` has it."""
        frozen = self.freeze_backbone
        features = backbone_of(self, name="backbone")(images, train=train and not frozen)
        if frozen:
            features = jax.lax.stop_gradient(features)
        return super().__call__(features, embeddings, adjacency, train=train, blend=blend)


def backbone_of(model: CLSL, *, name: str | None = None) -> nn.Module:
    """The backbone of a model by itself; its variables are those under 'backbone'."""
    return build_backbone(
        model.backbone,
        widths=model.backbone_widths,
        dtype=model.dtype,
        remat=model.remat,
        name=name,
    )


def head_of(model: CLSL) -> CLSLHead:
    """A model without its backbone; its variables are those beside 'backbone'."""
    own = {field.name for field in dataclasses.fields(CLSLHead)} - {"parent", "name"}
    return CLSLHead(**{name: getattr(model, name) for name in own})
