"""`Tower`: the base class of every image and text encoder."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple

from flax import linen as nn
from jax.nn import initializers
from jaxtyping import Float, Key

from clipx.config.ranges import CountOrZero, Positive, WidthOrZero
from clipx.models.layers import Lora, check, torch_bias, unit
from clipx.types import Array, Encoded

HEAD = ("projection",)  # entries of a tower's `params` above its features


class PositionTable(NamedTuple):
    """A tower's table of learned positions, which can be resized for inputs of another size."""

    path: tuple[str, ...]  # where the table [rows, channels] is in the tower's `params`
    first: int  # rows in front of the positions, such as the class token's
    shape: tuple[int, ...]  # the grid of the other rows: (side, side) patches, or (tokens,)


class Tower(nn.Module):
    """Base class of every tower: images or token ids in, `Encoded` out. Its fields are config keys.

    A tower writes `features`, which gives pooled features and tokens. `project`, its head, is
    common to all. Row i of each result depends on row i of `x` and on `keys[i]` alone (except for
    BatchNorm in training). `keys` are typed PRNG keys, needed only if `train` and dropout is on.

    `init_from` is a folder or file of pretrained weights of timm, torchvision, transformers or
    sentence-transformers. A new run starts from them; a run that goes on does not read them.

    Code outside `clipx/models/` never tests which class a tower has. A tower declares what others
    need to know: `from_tokenizer`, `needs_start_mark`, `backbone_width`, `position_table` and
    `unseen_settings`. None of these is a config key.
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
    init_from: str = ""
    lora_rank: CountOrZero = 0  # of the adapters of attention and MLP kernels (`Lora`); 0: none
    lora_alpha: Positive = 16.0  # adapters are scaled by lora_alpha / lora_rank
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
    def ignores_padding(self) -> bool:
        """Whether a text's pooled features stay the same without the padding after its end mark."""
        return False

    @nn.nowrap
    def at(self, field: str) -> str:
        """The `where` of a `ConfigError` about `field`."""
        return f"{type(self).__name__}.{field}"

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
        """All fields of `Encoded`, from what `features` gives: `raw` is a projection of `pooled`,
        or `pooled` if `embed_dim=0`."""
        raw = self.projection(pooled) if self.embed_dim else pooled
        return Encoded(unit=unit(raw), raw=raw, backbone=pooled, tokens=tokens)

    def __call__(
        self, x: Array, *, train: bool = False, keys: Key[Array, " b"] | None = None
    ) -> Encoded:
        """Every field of `Encoded`."""
        pooled, tokens = self.features(x, train=train, keys=keys)
        return self.project(pooled, tokens, train=train, keys=keys)
