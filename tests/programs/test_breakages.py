"""The guards are tested too: each deliberate breakage of a copy of the package must turn a named test red.

A test that stays green on a broken library proves nothing. Each case changes one line that the guarantee hangs on.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import mpidl

pytestmark = pytest.mark.guards

TOP = Path(__file__).parents[2]

if Path(sys.executable).with_name("ompi_info").exists():  # this environment's MPI is Open MPI from PyPI
    pytest.skip("the source is the same on every MPI: its breakages are shown on MPICH", allow_module_level=True)


@dataclass(frozen=True)
class Breakage:
    file: str
    line: str  # stands in the file exactly once
    broken: str
    test: str  # which test must fail, in tests/
    inside: str = ""  # pytest's arguments within the ranks


BREAKAGES = {
    "allreduce returns what it was given": Breakage(
        "collectives/operations.py",
        "    yield from ranks.allreduce(call, send, receive, op)\n",
        "    yield from ranks.barrier(call)\n    arrays.as_numpy(receive)[:] = arrays.as_numpy(send)\n",
        "mpi/test_collectives.py",
        "-k 'allreduce and size4'",
    ),
    "gradients are not summed": Breakage(
        "collectives/node.py",
        "(0, receive.address), **options)",
        '(0, receive.address), **options | {"op": "max"})',
        "mpi/test_synchronous.py",
        "-k 'equals_one_rank and size4'",
    ),
    "between nodes gradients are not summed": Breakage(
        "collectives/dispatch.py",
        'yield from topology.start_allreduce(send, receive, "sum")',
        'yield from topology.start_allreduce(send, receive, "max")',
        "mpi/test_by_mpi.py",
        "-k 'equals_one_rank and size4'",
    ),
    "a wrong call is not noticed in shared memory": Breakage(
        "collectives/node.py",
        "front.end(differs=progress == _node.DIFFERS)",
        "front.end(differs=False)",
        "mpi/test_mismatch.py",
    ),
    "what others committed during an overlapped exchange is forgotten": Breakage(
        "parameter_server/worker/delta.py",
        "        flat.shift(self._layout, views, moves.reached, center)\n",
        "        flat.shift(self._layout, views, moves.reached, moves.reached.copy())\n",
        "mpi/test_overlap.py",
        "-k 'is_what_it_says and size4'",
    ),
    "a commit skips the last shard": Breakage(
        "parameter_server/center/rma_array.py",
        "        for part in self._order:\n            if part.count:\n                self.window.add(",
        "        for part in self._order[:-1]:\n            if part.count:\n                self.window.add(",
        "mpi/test_server.py::4-ranks",
        "-k 'add_up_exactly_a_thousand and rma and servers0'",
    ),
    "a commit is read, added and written back": Breakage(
        "one_sided/window.py",
        "            self._window.Accumulate([piece, self._type], target, place, self._mpi.SUM)\n",
        "            old = np.empty_like(piece)\n"
        "            self._window.Get([old, self._type], target, place)\n"
        "            self._window.Flush(target)\n"
        "            self._window.Put([old + piece, self._type], target, place)\n"
        "            self._window.Flush(target)\n",
        "mpi/test_server.py::4-ranks",
        "-k 'add_up_exactly_a_thousand and rma and servers0'",
    ),
    "in shared memory a commit is read, added and written back": Breakage(
        "parameter_server/center/node_array.py",
        "            self._blocks.add(part.start, values[_place(part)])\n",
        "            old = np.empty_like(values[_place(part)])\n"
        "            self._blocks.read(part.start, old)\n"
        "            self._blocks.replace(part.start, old + values[_place(part)])\n",
        "mpi/test_server.py::4-ranks",
        "-k 'add_up_exactly_a_thousand and node and servers0'",
    ),
    "in shared memory a pull leaves its own commit out": Breakage(
        "parameter_server/center/node_array.py",
        "            self._blocks.add(part.start, values[_place(part)], scale, after=out[_place(part)])\n",
        "            self._blocks.add(part.start, values[_place(part)], scale, before=out[_place(part)])\n",
        "mpi/test_history.py::4-ranks",
        "-k 'free_runners and node'",
    ),
    "by active message a commit is read, added and written back": Breakage(
        "one_sided/message_server.py",
        "            self._array.add(at, values, self._scale, **read)\n",
        "            old = np.empty_like(values)\n"
        "            self._array.read(at, old)\n"
        "            __import__('time').sleep(1e-4)\n"
        "            self._array.replace(at, old + values)\n",
        "mpi/test_server.py::4-ranks",
        "-k 'add_up_exactly_a_thousand and active_message and servers0'",
    ),
    "messages to one rank are sent all at once": Breakage(
        "one_sided/active_message.py",
        "                    busy.add(message.to)\n",
        "                    pass\n",
        "mpi/test_protocols.py",
        "-k long_runs",
    ),
    "an answer leaves out what was sent with it": Breakage(
        "one_sided/message_server.py",
        '"before" if self._answer == BEFORE else "after": answer',
        '"after" if self._answer == BEFORE else "before": answer',
        "mpi/test_history.py::4-ranks",
        "-k 'free_runners and active_message'",
    ),
    "a commit counts before it has landed": Breakage(
        "parameter_server/center/center.py",
        "        self._center.add(delta)\n",
        "        self.clock.land()\n        __import__('time').sleep(0.002)\n        self._center.add(delta)\n",
        "mpi/test_server.py::4-ranks",
        "-k 'clocks_while_all_run_free and node and servers0'",
    ),
    "a bucket forgets the tensor that did not fit": Breakage(
        "arrays/layout.py",
        "members, nbytes = [], 0",
        "members, nbytes = [], -tensor.nbytes\n            continue",
        "mpi/test_synchronous.py",
        "-k 'every_bucket_size and size4'",
    ),
    "a late gradient is not sent again": Breakage(
        "synchronous/reduction/round.py",
        "        self._reduce(trailer.late, trailer.late, again=True)\n",
        "",
        "mpi/test_synchronous.py",
        "-k 'checkpointing and size4'",
    ),
    "the tail of a window is dropped": Breakage(
        "parameter_server/worker/base.py",
        "            if self._steps:\n                self._exchange()\n",
        "",
        "mpi/test_asynchronous.py",
        "-k 'tails_included and size4'",
    ),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_it_turns_a_test_red(tmp_path, name):
    case = BREAKAGES[name]
    package = tmp_path / "mpidl"
    shutil.copytree(Path(mpidl.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    source = (package / case.file).read_text()
    assert source.count(case.line) == 1, f"{case.file} no longer has the line that this case breaks"
    (package / case.file).write_text(source.replace(case.line, case.broken))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--inside=-x {case.inside}"]
    result = subprocess.run(
        [*command, str(TOP / "tests" / case.test)],
        env=environment,
        cwd=TOP,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert result.returncode == 1, result.stdout[-4000:] + result.stderr[-2000:]
    assert " (call)\n" in result.stdout, result.stdout[-4000:]  # the test itself failed, not its collection
