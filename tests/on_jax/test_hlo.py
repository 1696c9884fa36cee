"""What is read of a compiled program."""

import pytest

from vatt_fast.on_jax.hlo import Program

PROGRAM = """
HloModule step
%fused (p0: f32[8,128]) -> f32[128,8] {
  %p0 = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %copy.9 = f32[8,128]{0,1:T(8,128)} copy(%p0)
}
ENTRY %main (a: f32[8,128], b: f32[8,128]) -> f32[8,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %b = f32[8,128]{1,0:T(8,128)} parameter(1)
  %copy.1 = f32[8,128]{1,0:T(8,128)S(1)} copy(%a)
  %fusion.1 = f32[8,128]{0,1:T(8,128)} fusion(%copy.1), kind=kLoop, calls=%fused
  %transpose.1 = f32[128,8]{0,1:T(8,128)} transpose(%b), dimensions={1,0}
  %jvp_vatt_attention_forward_.3 = (f32[8,128]{1,0:T(8,128)}, f32[8]{0}) \
custom-call(%fusion.1, %b), \
custom_call_target="tpu_custom_call"
  %gte = f32[8,128]{1,0:T(8,128)} get-tuple-element(%jvp_vatt_attention_forward_.3), index=0
  %all-gather-start.1 = f32[8,128]{1,0} all-gather-start(%gte), dimensions={0}
  %all-reduce.1 = (f32[8]{0}, f32[8]{0}, f32[8]{0}, f32[8]{0}, f32[8]{0}, /*index=5*/f32[8]{0}) \
all-reduce(%a, %a, %a, %a, %a, %a), to_apply=%add
  ROOT %copy.2 = f32[8,128]{0,1:T(8,128)} copy(%gte)
}
"""


def test_layout_changes_kernels_and_collectives():
    """Moves to VMEM and transposes that move nothing are no layout changes; some fusions are."""
    program = Program(PROGRAM)
    assert program.kernels() == {"vatt_attention_forward": 1} and program.collectives() == {
        "all-reduce": 1,
        "all-gather": 1,
    }
    assert program.layout_changes() == {"fusion.1": 4096, "copy.2": 4096}
    assert program.layout_changes_at_kernels() == ["copy.2", "fusion.1"]


HLO = """
%fused (param_0.1: bf16[2,4,64,8]) -> bf16[2,4,8,64] {
  %param_0.1 = bf16[2,4,64,8]{3,2,1,0:T(8,128)} parameter(0)
  ROOT %copy.9 = bf16[2,4,64,8]{2,3,1,0:T(8,128)} copy(%param_0.1)
}

ENTRY %main (x.1: bf16[2,4,64,8], l.1: f32[2,4,64]) -> bf16[2,4,64,8] {
  %x.1 = bf16[2,4,64,8]{ORDER:T(8,128)} parameter(0)
  %l.1 = f32[2,4,64]{0,1,2} parameter(1)
  %copy.1 = bf16[2,4,64,8]{3,2,1,0:T(8,128)S(1)} copy(%x.1)
  %copy.2 = f32[2,4,64]{2,1,0} copy(%l.1)
  %bitcast.1 = f32[2,4,1,64]{3,2,1,0} bitcast(%copy.2)
  %vatt_attention_forward.1 = bf16[2,4,64,8]{3,2,1,0:T(8,128)} custom-call(%copy.1, %bitcast.1), \
custom_call_target="tpu_custom_call"
  ROOT %AFTER.1 = bf16[2,4,64,8]{2,3,1,0:T(8,128)} AFTER(%vatt_attention_forward.1)CALLEE
}
"""


@pytest.mark.parametrize(
    ("order", "after", "callee", "found"),
    [
        (
            "3,2,1,0",
            "negate",
            "",
            [],
        ),  # to another memory in the same order, and a row of statistics
        ("3,1,2,0", "negate", "", ["copy.1"]),
        ("3,2,1,0", "transpose", ", dimensions={0,1,2,3}", ["transpose.1"]),
        ("3,2,1,0", "fusion", ", kind=kLoop, calls=%fused", ["fusion.1"]),
    ],
)
def test_layout_copies_around_a_kernel_are_found(order, after, callee, found):
    program = Program(HLO.replace("ORDER", order).replace("AFTER", after).replace("CALLEE", callee))
    assert program.layout_changes_at_kernels() == found
    assert program.kernels() == {"vatt_attention_forward": 1}
