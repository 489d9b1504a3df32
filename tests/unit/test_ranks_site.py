"""What the tests' ranks put off of torch comes when something asks for it, and nothing in an optimizer does.

The garbage collector works once torch is there.
"""

from __future__ import annotations

import subprocess
import sys

from launching import environment_for_tests

PROGRAM = """
import gc, sys, torch
print(gc.isenabled(), gc.get_freeze_count() > 100_000)
model = torch.nn.Linear(2, 1)
for kind in (torch.optim.SGD, torch.optim.Adam):
    optimizer = kind(model.parameters(), lr=0.1)
    optimizer.zero_grad()
    model(torch.ones(4, 2)).mean().backward()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
torch.optim.lr_scheduler.StepLR(optimizer, 1)
print("torch._dynamo.utils" in sys.modules)
print(torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item())
import torch._dynamo.utils
print(torch._dynamo.utils.__name__, sys.modules["torch._dynamo"] is torch._dynamo, bool(torch._dynamo.__file__))
"""


def test_an_optimizer_does_without_and_the_compiler_gets_the_whole() -> None:
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, env=environment_for_tests(), check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["True True", "False", "2.0", "torch._dynamo.utils True True"]
