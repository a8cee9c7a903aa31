"""The tutorial "Grow your own network", as a program in cells; ``docs/tutorial.md`` is made from it and from a run.

Run it with ``python examples/grow_your_own.py`` (a few minutes on one core); what it writes goes to ``./grown``. An
editor that knows ``# %%`` runs it cell by cell. After a change: ``python examples/render.py``.
"""

# %% [markdown]
# # Grow your own network
#
# You have a model, a training loop of your own, and data. This page lets the model grow while that loop trains it,
# asks why it grew as it did, keeps the grown model, and holds it against two controls. It takes a few minutes on one
# core.
#
# The program is `examples/grow_your_own.py`; this page is made from it by `examples/render.py`: every block of code
# below is the program's own, in its order, and every block of output and both pictures come from one run of it. CI
# runs the program and checks what it leaves behind.
#
# You need `pip install esper mnist1d`. Nothing is downloaded while it runs.

# %%
from pathlib import Path

import torch
from matplotlib.figure import Figure
from mnist1d.data import get_dataset_args, make_dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import esper
from esper.recovery import CheckpointManager

EPOCHS = 30
SEEDS = (0, 1)
RATES = (2e-2, 5e-3)
out = Path("grown")
out.mkdir(exist_ok=True)

# %% [markdown]
# ## Data, in three splits
#
# `mnist1d` makes signals of 40 samples in ten classes, the same ones every time. Cut yours in three:
#
# - **train**: the loop learns from it;
# - **control**: never learnt from; every decision about growth is measured on it. A few hundred examples are enough
#   to start with; with fewer, small effects drown in the noise and seeds that help are removed;
# - **sealed**: read once, at the end. The control split cannot be the judge, for growth has chosen by it.

# %%
data = make_dataset(get_dataset_args())
signals, classes = torch.tensor(data["x"], dtype=torch.float32), torch.tensor(data["y"])
train_set, control_set = TensorDataset(signals[:3200], classes[:3200]), TensorDataset(signals[3200:], classes[3200:])
sealed_inputs, sealed_targets = torch.tensor(data["x_test"], dtype=torch.float32), torch.tensor(data["y_test"])
control_loader = DataLoader(control_set, batch_size=800)


def train_batches(seed: int) -> DataLoader[tuple[Tensor, ...]]:
    """Give the training batches; their order depends on the seed alone, so that every arm sees the same."""
    return DataLoader(train_set, batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(seed))


print(f"{len(train_set)} train, {len(control_set)} control, {len(sealed_targets)} sealed")

# %% [markdown]
# ## Your model
#
# Any `nn.Module` will do that has layers Esper knows (Linear, Conv1d and 2d, MultiheadAttention, LayerNorm,
# BatchNorm) or that you have registered. This one is too small on purpose, and of the wrong kind: it takes a signal
# for a flat vector.


# %%
class SignalNet(nn.Module):
    """A perceptron 40-32-10."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(40, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, signal: Tensor) -> Tensor:
        """Give the logits of each signal."""
        logits: Tensor = self.head(torch.relu(self.body(signal)))
        return logits


loss_fn = nn.CrossEntropyLoss()


def make_optimizer(model: nn.Module, rate: float = RATES[0]) -> torch.optim.AdamW:
    """Give the optimizer of every arm."""
    return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1)


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """Give the share of right answers in percent; the model is left in evaluation mode."""
    return 100 * float((model.eval()(inputs).argmax(1) == targets).double().mean())


# %% [markdown]
# ## Your loop, as it is today
#
# A loop as many have it: forward, loss, backward, clip, step. It trains the host alone, and later the other control.


# %%
def train(model: nn.Module, seed: int, rate: float) -> list[float]:
    """Train a model; give its control accuracy after each epoch, in percent."""
    optimizer, batches, curve = make_optimizer(model, rate), train_batches(seed), []
    for _ in range(EPOCHS):
        model.train()
        for inputs, targets in batches:
            loss = loss_fn(model(inputs), targets)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            optimizer.zero_grad()
        curve.append(accuracy(model, *control_set.tensors))
    return curve


# %% [markdown]
# ## The same loop, and the model grows
#
# Four things change. `esper.wrap` lets the layers hold seeds; until one germinates, outputs and gradients are the
# host's to the bit. An `esper.Session` goes around the loop. `session.step(loss)` takes the place of
# `optimizer.step()` and `zero_grad()` (`step_optimizer=False` leaves these to you), `session.end_epoch()` evaluates
# on the control split and tells the mesh how the run stands.
#
# - `budget`: at most twice the host's parameters may be added (a float is a share of the host, an int a number).
#   Seeds that race for one place are booked as the largest of them, for one at most is kept.
# - `planned_epochs` lets the policy see how much time is left.
# - `decision_wait_s`: a session never waits for the mesh unless it is asked to. Here an epoch takes a tenth of a
#   second, and the whole training would be over before the first seed is compiled; so each epoch waits for its
#   decision.
# - `checkpoints` says where `session.save_checkpoint()` writes.


# %%
def grow(seed: int, mesh: esper.Mesh) -> tuple[esper.MorphableModel, esper.RunReport, str]:
    """Grow a model; give it with its report and the id of a checkpoint of its last state."""
    torch.manual_seed(seed)
    model = esper.wrap(SignalNet())
    optimizer, batches = make_optimizer(model), train_batches(seed)
    with esper.Session(
        model,
        optimizer,
        loss_fn=loss_fn,
        control_loader=control_loader,
        mesh=mesh,
        budget=esper.Budget(added_params=2.0),
        seed=seed,
        config=esper.SessionConfig(
            run_id=f"tutorial-{seed}",
            planned_epochs=EPOCHS,
            decision_wait_s=60.0,
            checkpoints=CheckpointManager(out / "checkpoints"),
        ),
    ) as session:
        for _ in range(EPOCHS):
            model.train()
            for inputs, targets in batches:
                loss = loss_fn(model(inputs), targets)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 5.0)
                session.step(loss)
            session.end_epoch()
        report = session.report()  # ends growth first: what is still open is measured, and kept only if it pays
        checkpoint_id = session.save_checkpoint()
    return model, report, checkpoint_id


# %% [markdown]
# `Mesh.embedded()` runs all six services inside this process. (It compiles kernels in threads without the sandbox,
# and says so on stderr: `compile_pool_inline`. `Mesh.local()` and `Mesh.connect()` take its place without another
# change.)
#
# Nothing below says where to grow, when, or what.

# %%
mesh = esper.Mesh.embedded()
model, report, checkpoint_id = grow(SEEDS[0], mesh)
(out / "report.json").write_text(report.to_json(), encoding="utf-8")

before, after = report.history[0], report.history[-1]
print(f"{report.host_params:,} parameters before, {report.final_params:,} after")
print(f"control loss {before.control_loss:.3f} after the first epoch, {after.control_loss:.3f} after the last")
print(f"{len(report.kept)} of {len(report.adaptations)} adaptations kept")
for item in report.adaptations:
    what = f"{item.blueprint or item.adaptation_type} at {item.layer or 'the optimizer'}"
    effect = "not measured"
    if item.contribution is not None and item.interval is not None:
        effect = f"{item.contribution:+.4f} ({item.interval[0]:+.4f} to {item.interval[1]:+.4f})"
    print(f"  epoch {item.begun_epoch:2}  {item.outcome:6}  {effect:32}  {item.parameters:5,}  {what}")

# %% [markdown]
# One line is one adaptation: the epoch in which it began, what became of it, its contribution with the interval of
# that, its parameters, and what stood where. The **contribution** is the control loss with the seed off minus the
# loss with it on, paired example by example. A seed is kept when the lower end of the interval lies above its price,
# which grows with its parameters. Most lines of one epoch are one **race**: several seeds learn side by side behind
# the host's back, none of them touching its output; the best is blended in, the others go without a trace.
# `optimize_parameters` is no seed: a change of learning rate and weight decay that is undone unless the control loss
# fell by it.
#
# ## Ask why
#
# Every decision can be explained, now or later: what the policy saw, what it expected, who raced, what came of it.
# Against a mesh of processes, `esper runs explain ADAPTATION_ID` prints the same lines. Here is the one that brought
# most. A seed `on the input of` another layer reads what that layer is given: behind `body`, neighbouring samples are
# no longer neighbours.

# %%
most = max(report.adaptations, key=lambda item: item.contribution or 0.0)
with mesh.client() as client:
    for line in client.tamiyo.explain(most.id).lines:
        print(line)

# %% [markdown]
# ## Keep it, take it up again
#
# The session's checkpoint holds everything: model, grown structure, optimizer, random streams. A fresh host under a
# new session takes it over, seeds and all, in this process or another, over this mesh or another; training can go on
# from there. The model alone goes through its `state_dict`, which says what stands where and holds nothing but
# tensors. Both give the same outputs to the bit.

# %%
fresh = esper.wrap(SignalNet())
with esper.Session(
    fresh,
    make_optimizer(fresh),
    loss_fn=loss_fn,
    control_loader=control_loader,
    mesh=mesh,
    config=esper.SessionConfig(checkpoints=CheckpointManager(out / "checkpoints")),
) as taken_up:
    taken_up.load_checkpoint(checkpoint_id)
mesh.close()

torch.save(model.state_dict(), out / "model.pt")
reloaded = esper.wrap(SignalNet())
reloaded.load_state_dict(torch.load(out / "model.pt", weights_only=True))

with torch.no_grad():
    answers = model.eval()(sealed_inputs)
    print("from the checkpoint: equal to the bit:", torch.equal(fresh.eval()(sealed_inputs), answers))
    print("from the state dict: equal to the bit:", torch.equal(reloaded.eval()(sealed_inputs), answers))

# %% [markdown]
# ## Take it away without Esper
#
# `esper.export` gives a copy in ordinary torch modules, which needs no Esper to run, train or be exported further.

# %%
plain = esper.export(model)
program = torch.export.export(plain, (sealed_inputs,), dynamic_shapes=({0: torch.export.Dim("batch")},))
torch.export.save(program, out / "model.pt2")

with torch.no_grad():
    print("exported: equal to the bit:", torch.equal(plain(sealed_inputs), answers))
print("modules come from:", ", ".join(sorted({type(module).__module__.split(".")[0] for module in plain.modules()})))

# %% [markdown]
# ## Did growing pay?
#
# Two controls, each with the host's initial weights, the same batches in the same order, the same loop, as many
# epochs, and the better of two learning rates by the control split (the grown run began with the first of them):
#
# - **the host alone**;
# - **the grown topology from scratch**: the same kept seeds, known from the first step on, with weights drawn anew.
#   It answers whether growing was worth anything beyond finding that topology.
#
# Each seed grows through a new mesh, so that no run knows what an earlier one has learnt.


# %%
def from_scratch(grown: esper.MorphableModel, seed: int) -> nn.Module:
    """Give a grown model's topology as plain torch modules without a trained weight."""
    torch.manual_seed(seed)
    wrapped = esper.wrap(SignalNet())
    with torch.no_grad():
        wrapped(sealed_inputs[:1])  # layers learn their shapes from a pass
    wrapped.rebuild(grown.grown_structure())
    topology = esper.export(wrapped)
    for name, module in topology.named_modules():
        if "seeds" in name.split(".") and hasattr(module, "reset_parameters"):
            module.reset_parameters()  # as torch draws such modules; a seed as born has no effect at first
    return topology.train()


def host_alone(seed: int) -> nn.Module:
    """Give the host as every arm of a seed starts from it."""
    torch.manual_seed(seed)
    return SignalNet()


def at_its_best_rate(copies: list[nn.Module], seed: int) -> tuple[nn.Module, list[float]]:
    """Train a copy of a control at each rate; give the one that does best on the control split, with its curve."""
    trained = [(model, train(model, seed, rate)) for model, rate in zip(copies, RATES, strict=True)]
    return max(trained, key=lambda one: one[1][-1])


results: list[dict[str, float]] = []
curves: dict[str, list[float]] = {}
for seed in SEEDS:
    grown = model
    if seed != SEEDS[0]:
        with esper.Mesh.embedded() as another:
            grown = grow(seed, another)[0]
    host, host_curve = at_its_best_rate([host_alone(seed) for _ in RATES], seed)
    scratch, scratch_curve = at_its_best_rate([from_scratch(grown, seed) for _ in RATES], seed)
    found = {"host alone": host_curve, "grown topology from scratch": scratch_curve}
    curves = curves or found  # those of the first seed are drawn below
    arms = {"host": host, "scratch": scratch, "grown": grown}
    results.append({name: accuracy(arm, sealed_inputs, sealed_targets) for name, arm in arms.items()})
    size = sum(parameter.numel() for parameter in grown.parameters())
    line = ", ".join(f"{name} {value:.1f} %" for name, value in results[-1].items())
    print(f"seed {seed}: sealed accuracy: {line}; {size:,} parameters")


def margin(control: str) -> str:
    """Give grown minus a control: the mean over the seeds, and the least and greatest difference."""
    differences = [result["grown"] - result[control] for result in results]
    return f"{sum(differences) / len(differences):+.1f} points ({min(differences):+.1f} to {max(differences):+.1f})"


print("grown minus the host alone:", margin("host"))
print("grown minus its topology from scratch:", margin("scratch"))

# %% [markdown]
# What this shows and what not. The host alone lacks a map that sees neighbouring samples; growing found one without a
# hint, and neither learning rate makes up for it. Two seeds on one task are **no claim** about growing in general,
# and the second margin is no fair fight: a grown run may change its learning rate on the way, this control keeps its
# own; and growing spent more compute. `esper bench growth` (`docs/growth-measure.md`) gives controls a falling rate
# and as many FLOPs as growing spent, over ten seeds, with intervals. Where the host lacks nothing, growing brings
# little: the README's demo is such a task.
#
# ## Look at it
#
# The first seed's run: control accuracy with what was kept, when; and what each adaptation contributed.


# %%
def draw_accuracy(run: esper.RunReport, controls: dict[str, list[float]], path: Path) -> None:
    """Draw control accuracy over the epochs, with a mark where an adaptation began and where it was kept."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    epochs = [record.epoch for record in run.history]
    grown = [100 * (record.control_accuracy or 0.0) for record in run.history]
    axes.plot(epochs, grown, color="black", linewidth=2, label="grown")
    for name, curve in controls.items():
        axes.plot(epochs, curve, linewidth=1.2, label=name)
    steps_per_epoch = run.history[-1].step / len(run.history)
    for number, item in enumerate(run.kept):
        ends, height = (item.begun_epoch, item.begun_epoch + item.steps / steps_per_epoch), 4 + 6 * number
        axes.plot(ends, (height, height), marker="|", color="tab:green")
        axes.text(ends[0], height + 1, f" {item.blueprint or item.adaptation_type}", fontsize=8)
    culled = [item.begun_epoch for item in run.adaptations if item.outcome != "kept"]
    axes.plot(culled, [0.0] * len(culled), "x", color="tab:red", markersize=5, label="began, was not kept")
    axes.plot([], [], marker="|", color="tab:green", label="began to kept")
    axes.set(xlabel="epoch", ylabel="accuracy on the control split, %", ylim=(-2, 102))
    figure.legend(fontsize=8, loc="outside upper center", ncols=5)
    figure.savefig(path, dpi=90)


def draw_contributions(run: esper.RunReport, path: Path) -> None:
    """Draw what each measured adaptation contributed, with its interval and its price."""
    shown = [
        (item, item.contribution, item.interval)
        for item in run.adaptations
        if item.contribution is not None and item.interval is not None
    ]
    figure = Figure(figsize=(8, 1.6 + 0.24 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for place, (item, contribution, interval) in enumerate(shown):
        colour = "tab:green" if item.outcome == "kept" else "tab:red" if item.graft_steps else "tab:grey"
        axes.plot(interval, (place, place), color=colour)
        axes.plot([contribution], [place], "o", color=colour, markersize=4)
        axes.plot([item.price or 0.0], [place], "|", color="black", markersize=8)
    axes.axvline(0.0, color="grey", linewidth=0.8)
    axes.set_xscale("symlog", linthresh=0.01)
    names = [f"epoch {item.begun_epoch}: {item.blueprint or item.adaptation_type}" for item, _, _ in shown]
    axes.set_yticks(range(len(shown)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("control loss with it off minus on, with its interval; black: price")
    axes.set_title("green: kept; red: blended in and removed; grey: lost its race, learnt alone", fontsize=9)
    figure.savefig(path, dpi=90)


draw_accuracy(report, curves, out / "accuracy.png")
draw_contributions(report, out / "contributions.png")

# %% [markdown]
# ![Control accuracy over the epochs](tutorial/accuracy.png)
#
# ![Contribution of each adaptation](tutorial/contributions.png)
#
# ## With a model of your own
#
# - A loss that is a plain function cannot be watched from outside: give the batch as well, `session.step(loss,
#   batch=(inputs, targets))`. A module such as `nn.CrossEntropyLoss` needs nothing.
# - Let the session know what else has state: `session.track("schedule", scheduler)`.
# - A gradient scaler, or an optimizer step of your own: `Session(..., step_optimizer=False)`, and step before
#   `session.step`.
# - Large models need no `decision_wait_s`: they train on while the mesh decides.
# - `GrowthConfig` (in `SessionConfig.growth`) says how long seeds learn alone, how they are blended in and what they
#   cost.
