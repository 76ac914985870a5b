"""`Tower`: the base class of every image and text encoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

from flax import linen as nn
from jax.nn import initializers
from jaxtyping import Float, Key

from clipx.config.ranges import CountOrZero, Positive, Rate, Width, WidthOrZero
from clipx.models import cpu
from clipx.models.layers import (
    Affine,
    LayerNorm,
    Lora,
    check,
    drop,
    dropout_keys,
    torch_bias,
    torch_uniform,
    unit,
)
from clipx.types import Array, Encoded

# entries of a tower's `params` above its features; all begin with the first
HEAD = ("projection", "projection_mlp")
_DROPOUT = 1 << 20  # indices of the head's dropouts, apart from those of the layers below


class PositionTable(NamedTuple):
    """A tower's table of learned positions, which can be resized for inputs of another size."""

    path: tuple[str, ...]  # where the table [rows, channels] is in the tower's `params`
    first: int  # rows in front of the positions, such as the class token's
    shape: tuple[int, ...]  # the grid of the other rows: (side, side) patches, or (tokens,)


class ResidualMLP(nn.Module):
    """What an `mlp` head adds to its projection: LayerNorm, dense layer, GELU, dropout, and a dense
    layer that starts at zero."""

    width: int
    outputs: int
    dropout: float
    dtype: str

    @nn.compact
    def __call__(
        self, x: Float[Array, "b c"], keys: Key[Array, " b"] | None
    ) -> Float[Array, "b d"]:
        def dense(name: str, x: Array, width: int, kernel_init: Callable) -> Array:
            init = initializers.zeros if name == "proj" else torch_bias(x.shape[-1])
            return Affine((width,), self.dtype, kernel_init, init, name=name)(x)

        y = dense("fc", LayerNorm(dtype=self.dtype, name="ln")(x), self.width, torch_uniform)
        y = _dropped(nn.gelu(y, approximate=False), self.dropout, keys, 1)
        return dense("proj", y, self.outputs, initializers.zeros)


def _dropped(
    x: Float[Array, "b c"], rate: float, keys: Key[Array, " b"] | None, index: int
) -> Float[Array, "b c"]:
    return drop(x[:, None], rate, keys, _DROPOUT + index)[:, 0]


class Tower(nn.Module):
    """Base class of every tower: images or token ids in, `Encoded` out. Its fields are config keys.

    A tower writes `features`, which gives pooled features and tokens. `project`, its head, is
    common to all. Row i of each result depends on row i of `x` and on `keys[i]` alone (except for
    BatchNorm in training). `keys` are typed PRNG keys, needed only if `train` and dropout is on.

    `head` "linear" is the projection alone; "mlp" adds a perceptron of one hidden layer, which
    starts at zero (`ResidualMLP`). `head_dropout` acts on the head's input and hidden layer.
    `head_init` "cca" is what `clipx.training.whitening` says.

    `init_from` is a folder or file of pretrained weights of timm, torchvision, transformers or
    sentence-transformers. A new run starts from them; a run that goes on does not read them.

    Code outside `clipx/models/` never tests which class a tower has. A tower declares what others
    need to know: `from_tokenizer`, `needs_start_mark`, `backbone_width`, `position_table`,
    `unseen_settings` and `idle_ids`. None of these is a config key.
    """

    # fields that are filled in from the config's tokenizer, and may not be in the tower's section
    from_tokenizer: ClassVar[tuple[str, ...]] = ()
    # whether the tower's output is read at the start mark, so that every text must have one
    needs_start_mark: ClassVar[bool] = False
    # whether the tower has blocks of attention and MLPs, whose kernels can have low-rank adapters
    adaptable: ClassVar[bool] = False

    embed_dim: WidthOrZero = 512  # of the shared space; 0: no projection, `raw` is `backbone`
    dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16"  # of compute; parameters: float32
    projection_bias: bool = False  # CLIP's projections have no bias, DeCLIP's text tower has one
    head: Literal["linear", "mlp"] = "linear"  # of the projection; mlp adds a hidden layer
    head_width: Width = 1024  # of the hidden layer of an mlp
    head_dropout: Rate = 0.0  # of the head's input and hidden layer
    # cca: a canonical correlation analysis of both towers' features
    head_init: Literal["random", "cca"] = "random"
    init_from: str = ""  # a folder or file of pretrained weights of another library
    lora_rank: CountOrZero = 0  # of the adapters of attention and MLP kernels (`Lora`); 0: none
    lora_alpha: Positive = 16.0  # adapters are scaled by lora_alpha / lora_rank
    # BatchNorm uses its running statistics in training too, and keeps them: batches of a small data
    # set spoil those of a pretrained tower. Towers without BatchNorm are as they are
    frozen_statistics: bool = False
    # a tower that is frozen below its head runs over the data once, before the first step: its
    # features are kept in the workdir
    cache: bool = False

    def __post_init__(self):
        self.check()
        super().__post_init__()

    @nn.nowrap
    def check(self) -> None:
        """Raises `ConfigError` for impossible values of fields. Runs on every Linen clone."""
        check(
            self.adaptable or not self.lora_rank,
            self.at("lora_rank"),
            f"{self.lora_rank}, for a tower without attention and MLPs",
            "0",
            "lora_rank=0, and train the tower or its head",
        )

        headless = (self.head, self.head_dropout, self.head_init) == ("linear", 0.0, "random")
        check(
            self.embed_dim > 0 or headless,
            self.at("embed_dim"),
            f"0, for no head, with head={self.head}, head_dropout={self.head_dropout} and "
            f"head_init={self.head_init}",
            "a width for a tower with a head",
            "embed_dim=256",
        )

    @property
    def headless(self) -> Tower:
        """The tower without its head: `raw` is what the head would get."""
        return self.clone(embed_dim=0, head="linear", head_dropout=0.0, head_init="random")

    @property
    def backbone_width(self) -> int:
        """Channels of `Encoded.backbone`."""
        raise TypeError(f"{type(self).__name__} declares no backbone_width")

    @property
    def output_width(self) -> int:
        """Channels of `Encoded.raw`: those of the projection, or of the backbone without one."""
        return self.embed_dim or self.backbone_width

    @property
    def biased_projection(self) -> bool:
        """Whether the projection has a bias."""
        return self.projection_bias

    @property
    def lora(self) -> Lora | None:
        """The adapters of the tower's blocks; None without any."""
        return Lora(self.lora_rank, self.lora_alpha) if self.lora_rank else None

    @property
    def position_table(self) -> PositionTable | None:
        """The learned positions whose number depends on the image size or text length, if any."""
        return None

    @property
    def unseen_settings(self) -> dict[str, Any]:
        """Settings that change the output but no array's shape. Parameters do not fit a model that
        differs in one of them, although every array has the right shape."""
        return {}

    @property
    def idle_ids(self) -> tuple[str, ...]:
        """Those of `from_tokenizer` whose value changes no output and no shape."""
        return ()

    @property
    def ignores_padding(self) -> bool:
        """Whether a text's pooled features stay the same without the padding after its end mark."""
        return False

    @nn.nowrap
    def at(self, field: str) -> str:
        """The `where` of a `ConfigError` about `field`."""
        return f"{type(self).__name__}.{field}"

    @nn.nowrap
    def check_images(self, x: Array, side: int) -> None:
        """Raises `ValueError` unless x has RGB images of `side` pixels, the tower's image size."""
        if x.shape[1:] != (side, side, 3):
            raise ValueError(f"{self.at('image_size')}={side}, but images of {x.shape}")

    def setup(self):
        if not self.embed_dim:
            return
        width = self.backbone_width
        # the kernel starts as N(0, 1/c) (CLIP, clip/model.py), the bias as torch's do
        self.projection = nn.Dense(
            self.embed_dim,
            use_bias=self.biased_projection,
            dtype=self.dtype,
            kernel_init=initializers.normal(width**-0.5),
            bias_init=torch_bias(width),
            dot_general=cpu.dot_general,
        )
        if self.head == "mlp":
            self.projection_mlp = ResidualMLP(
                self.head_width, self.embed_dim, self.head_dropout, self.dtype
            )

    def features(
        self, x: Array, *, train: bool = False, keys: Key[Array, " b"] | None = None
    ) -> tuple[Float[Array, "b c"], Float[Array, "b n c"]]:
        """(pooled features, tokens) of images or token ids: everything below the head."""
        raise TypeError(f"{type(self).__name__} does not implement features")

    def project(
        self,
        pooled: Float[Array, "b c"],
        tokens: Float[Array, "b n c"] | None = None,
        *,
        train: bool = False,
        keys: Key[Array, " b"] | None = None,
    ) -> Encoded:
        """All fields of `Encoded`, from what `features` gives: `raw` is what the head makes of
        `pooled`, or `pooled` if `embed_dim=0`."""
        raw = pooled
        if self.embed_dim:
            keys = dropout_keys(self.head_dropout, train, keys)
            x = _dropped(pooled, self.head_dropout, keys, 0)
            raw = self.projection(x)
            if self.head == "mlp":
                raw = raw + self.projection_mlp(x, keys)
        return Encoded(unit=unit(raw), raw=raw, backbone=pooled, tokens=tokens)

    def __call__(
        self, x: Array, *, train: bool = False, keys: Key[Array, " b"] | None = None
    ) -> Encoded:
        """Every field of `Encoded`."""
        pooled, tokens = self.features(x, train=train, keys=keys)
        return self.project(pooled, tokens, train=train, keys=keys)
