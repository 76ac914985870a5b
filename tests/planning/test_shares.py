"""Which layer, pass and kind of work the time of a compiled step goes to."""

import pytest

from clipx.planning import hlo, shares

STEP = "jit(train_step)/"
EMBED = STEP + "jvp(CLIP.embed)/CLIP.encode_image/CLIP._tower/image/image.features/"
BACK = STEP + "transpose(jvp(CLIP.embed))/CLIP.encode_text/CLIP._tower/text/text.features/"


@pytest.mark.parametrize(
    "source, layer, backward",
    [
        (EMBED + "transformer/block_3/mlp/fc/dot_general", "image/transformer/block/mlp", False),
        (
            BACK + "transformer/while/body/closed_call/blocks.<lambda>/blocks/attn/qkv/dot_general",
            *("text/transformer/block/attn", True),
        ),
        (
            EMBED + "transformer/while/body/checkpoint/rematted_computation/blocks/ln_1/mul",
            *("image/transformer/block/ln_1", True),
        ),
        (EMBED + "transformer/while/body/jit(index)/squeeze", "image/transformer", False),
        (EMBED + "patch_embedding/dot_general", "image/patch_embedding", False),
        (STEP + "jvp(CLIP.embed)/CLIP.picture/mul", "embed", False),
        (STEP + "transpose(jvp(CLIP.loss))/shard_map/id,jd->ij/dot_general", "loss", True),
        (
            STEP + "jvp(FILIP.loss)/late_interaction/shard_map/while/body/exp",
            *("loss/late_interaction", False),
        ),
        (STEP + "jit(_where)/select_n", "update", False),
        ("", shares.UNNAMED, False),
        ("broadcast.562", shares.UNNAMED, False),
    ],
)
def test_place(source, layer, backward):
    assert shares.place(source) == (layer, backward)


PROGRAM = f"""HloModule m

%inside (p: f32[8,128]) -> f32[8,128] {{
  %p = f32[8,128] parameter(0)
  ROOT %d = f32[8,128] convolution(%p, %p), dim_labels=bf_io->bf
}}

%body (s: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {{
  %s = (s32[], f32[8,128]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %y = f32[8,128] get-tuple-element(%s), index=1
  %f = f32[8,128] fusion(%y), calls=%inside, metadata={{op_name="{EMBED}block_0/mlp/fc/dot"}}, \
"estimated_cycles":"10"
  ROOT %t = (s32[], f32[8,128]) tuple(%i, %f)
}}

%cond (q: (s32[], f32[8,128])) -> pred[] {{
  %q = (s32[], f32[8,128]) parameter(0)
  ROOT %c = pred[] constant(false)
}}

ENTRY %main (x: f32[8,128]) -> f32[8,128] {{
  %x = f32[8,128] parameter(0)
  %zero = s32[] constant(0)
  %t = (s32[], f32[8,128]) tuple(%zero, %x)
  %w = (s32[], f32[8,128]) while(%t), condition=%cond, body=%body, "known_trip_count":{{"n":"6"}}
  %z = f32[8,128] copy(%x), "estimated_cycles":"20"
  ROOT %k = f32[8,128] custom-call(%z), custom_call_target="tpu_custom_call", \
metadata={{op_name="{BACK}block_1/attn/pallas_call"}}, \
"cost_estimate":{{"flops":"1000","bytes_accessed":"0"}}
}}
"""


def test_time_is_shared_out_by_layer_and_by_kind_of_work():
    """A product of 10 cycles in a loop of 6, a copy of 20 cycles, and a kernel of 20 seconds."""
    program = hlo.read(PROGRAM)
    rates = {"peak": 100.0, "bandwidth": 1e9, "clock": 1.0}
    each = [o.seconds(**rates) for o in program.operations]
    assert sum(each) == program.seconds(**rates) == pytest.approx(100)
    found = shares.by_layer(program.operations, lambda o: o.seconds(**rates))
    assert {s.layer: (s.forward, s.backward) for s in found} == {
        "image/block/mlp": (pytest.approx(0.6), 0),
        "text/block/attn": (0, pytest.approx(0.2)),
        shares.UNNAMED: (pytest.approx(0.2), 0),
    }
    assert found[0].layer == "image/block/mlp"
    works = shares.by_work(program.operations, lambda o: o.seconds(**rates))
    expected = {"products": 0.6, "kernels": 0.2, "copies": 0.2, "other": 0}
    assert works == pytest.approx(expected)
