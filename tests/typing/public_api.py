"""What a type checker makes of a user's code. `make check` runs mypy over it; nothing here is executed.

Lines that must not check carry an ignore: an ignore that is not needed is an error, so that each is proved to be one.
"""

from typing import Any, assert_type

import torch

from optimd.client import Adam, AdamW, OptimizerProxy, ProxyOptions, StepReceipt, Sync

model = torch.nn.Linear(2, 2)

optimizer = Adam(model.parameters(), lr=1e-3, server="gpu-host:50551", job="resnet50")
decoupled = AdamW(
    model.named_parameters(),
    betas=(0.9, 0.95),
    options=ProxyOptions(aggregation=Sync(world_size=2, reduction="mean"), on_existing="resume", apply="atomic"),
)

as_torchs: torch.optim.Adam = optimizer
as_proxy: OptimizerProxy = decoupled
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)


def closure() -> float:
    return 1.0


assert_type(optimizer.step(), None)
assert_type(optimizer.step(closure), float)
assert_type(optimizer.last_receipt, StepReceipt | None)
assert_type(optimizer.next_sequence, int)
assert_type(optimizer.resumed, bool)


def hook(given: Adam, receipt: StepReceipt) -> None:
    assert_type(receipt.sequence, int | None)


assert_type(optimizer.register_server_step_hook(hook), torch.utils.hooks.RemovableHandle)
assert_type(optimizer.attach_buffers(model), None)
assert_type(optimizer.snapshot(), int)
assert_type(optimizer.state_dict(), dict[str, Any])
optimizer.load_state_dict(optimizer.state_dict(), force=True)

with optimizer as entered:
    assert_type(entered, Adam)

Adam(model.parameters(), 1e-3, (0.9, 0.99), 1e-8, 0, False, None)  # type: ignore[call-arg]
optimizer.register_server_step_hook(lambda: None)  # type: ignore[arg-type, misc]
Adam(model.parameters(), server=50551)  # type: ignore[arg-type]
ProxyOptions("resume")  # type: ignore[call-arg, arg-type]
ProxyOptions(on_existing="maybe")  # type: ignore[arg-type]
ProxyOptions(on_rewind="maybe")  # type: ignore[arg-type]
Sync(reduction="median")  # type: ignore[arg-type]
StepReceipt(step=1)  # type: ignore[call-arg]
