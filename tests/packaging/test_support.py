"""What the tests stand on."""

import os
import subprocess
import sys
import time

import pytest
from processes import kill_processes_of


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_processes_end_with_their_test(request):
    """Also those that have left its session, and whose parent has ended."""
    starter = subprocess.run(
        ["bash", "-c", "setsid sleep 1000 >/dev/null 2>&1 & echo $!"],
        capture_output=True,
        text=True,
        check=True,
    )
    status = f"/proc/{int(starter.stdout)}/stat"

    def runs() -> bool:
        try:
            with open(status) as file:
                return file.read().rpartition(")")[2].split()[0] != "Z"
        except FileNotFoundError:
            return False

    assert runs()
    kill_processes_of("tests/packaging/test_support.py::another_test")
    assert runs()
    kill_processes_of(request.node.nodeid)
    until = time.monotonic() + 60
    while runs():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="no scheduling policies here")
def test_encoders_leave_the_scheduling_alone(tmp_path):
    av = pytest.importorskip("av")
    if "libsvtav1" not in av.codecs_available:
        pytest.skip("this PyAV has no SVT-AV1")
    from media_files import encode

    encode(tmp_path / "clip.mp4", video="libsvtav1", seconds=0.5, video_options={"preset": "12"})
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
