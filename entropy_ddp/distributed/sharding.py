"""A model whose layers no rank holds whole: each is gathered from all ranks when it runs.

`fully_shard` (FSDP2) cuts every parameter of a layer along its first dimension, a part
for each rank; before the layer runs forward, and again before it runs backward, the
parts are gathered, and afterwards dropped. Within the layer tensors are plain, so that
forward mode knows nothing of it.

A gather is a collective: all ranks must make the same ones in the same order. So they
pass over the model in rounds. A round is one microbatch on every rank; a rank that has
none left passes over a spare row, and one that has run out of memory takes part in the
gathers of the round that it has not come to. Which gathers a round makes is recorded in
the first one, and every later round is held against it.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from entropy_ddp.distributed.group import announced_as_errors
from entropy_ddp.distributed.world import World
from entropy_ddp.errors import InputError, RunError
from entropy_ddp.memory import is_shortage

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Returned = TypeVar("Returned")


class Sliced(Protocol):
    """A flat vector in memory, or in a file of which slices are read."""

    def __getitem__(self, place: slice, /) -> Tensor:
        """The elements of a slice."""


class WholeLayers:
    """Every rank has all layers: it runs as many passes as it has work for."""

    is_sharded = False
    # Whether a rank has a part of every vector over the trainable elements, too.
    has_parts = False
    # Number of ranks over which a backward pass sums gradients.
    num_summed = 1

    def is_work_left(self, on_this_rank: bool) -> bool:
        """Whether a rank has a microbatch left to pass over."""
        return on_this_rank

    def most(self, on_this_rank: int) -> int:
        """How many passes every rank has to make, so that none makes more."""
        return on_this_rank

    def together(self, call: Callable[[], Returned], backward: bool) -> Returned:
        """What a call gives that passes over one microbatch."""
        return call()

    def recover(self) -> None:
        """Make the model ready again after a call that ran out of memory."""

    def within(self, call: Callable[[], Returned]) -> Returned:
        """What a call gives that uses the model's outer parameters: embedding, head."""
        return call()

    def collect_gradients(self) -> None:
        """After a backward pass: gradients are where the parameters are."""

    def totals(self, values: Iterable[float]) -> list[float]:
        """Sums over the parts of vectors, of this rank's part of each."""
        return list(values)

    def total(self, value: float) -> float:
        """The same of one."""
        return self.totals([value])[0]

    def whole(self, name: str, part: Tensor) -> Tensor:
        """The whole of a tensor that is divided as the parameter of this name is."""
        return part

    def joined(self, vector: Tensor) -> Tensor | None:
        """The whole of a flat vector over the trainable elements; on rank 0 at least."""
        return vector

    def cut(self, vector: "Sliced") -> Tensor:
        """This rank's part of a flat vector, in memory of its own."""
        return vector[:].clone()

    def serving(
        self, model: nn.Module, spare: Callable[[], object]
    ) -> AbstractContextManager[None]:
        """A context in which ranks call the model as often as they like."""
        return nullcontext()

    def gathered(
        self, named: Iterable[tuple[str, Tensor]]
    ) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors, one at a time."""
        yield from named

    @property
    def gathered_bytes(self) -> int:
        """Bytes of the largest layer that is gathered; 0 where none is."""
        return 0


class ShardedLayers(WholeLayers):
    """The layers of a model, each in parts on the ranks.

    Args:
        layers: modules that `fully_shard` has been applied to, each a root of its own.
        world: the ranks.
    """

    is_sharded = True

    def __init__(self, layers: list[nn.Module], world: World) -> None:
        self._layers, self._world = list(layers), world
        # Of a round forward only, and of one with a backward pass: (layer, step), in
        # order, as the first round of the kind made them.
        self._recorded: dict[bool, list[tuple[int, str]]] = {}
        self._expected: deque[tuple[int, str]] | None = None
        self._made: list[tuple[int, str]] = []
        self._is_in_round = self._is_gathering = False
        # As it arrives, and as it is computed with.
        self._bytes = 2 * max(sum(map(_whole_bytes, m.parameters())) for m in layers)
        for number, layer in enumerate(layers):
            self._watch(number, layer)
        # Roots of trees of gathered modules: each forgets a pass that has failed.
        self._roots = self._layers

    def is_work_left(self, on_this_rank: bool) -> bool:
        """Whether any rank has a microbatch left; one collective."""
        return bool(self._world.max(float(on_this_rank)))

    def most(self, on_this_rank: int) -> int:
        """Largest number of passes over ranks; one collective."""
        return int(self._world.max(float(on_this_rank)))

    def together(self, call: Callable[[], Returned], backward: bool) -> Returned:
        """What a call gives that passes over one microbatch, on every rank one.

        Args:
            call: passes forward over all layers.
            backward: whether it passes backward too.

        Raises:
            RunError: it made other gathers than the first round did, ran out of memory
                within a gather, or a rank did not come to one in time.
        """
        recorded = self._recorded.get(backward)
        self._expected = None if recorded is None else deque(recorded)
        self._made, self._is_in_round, self._is_gathering = [], True, False
        try:
            with self._world.late_ranks_named():
                result = call()
        except Exception as error:
            self._is_in_round = False
            if not is_shortage(error):
                self._reset()
            raise
        self._is_in_round = False
        if recorded is None:
            self._recorded[backward] = self._made
        elif self._expected:
            self._refuse_order(None)
        return result

    def recover(self) -> None:
        """Take part in the gathers of the round that this rank has not come to.

        Raises:
            RunError: memory ran out within a gather, or before the first round was done.
        """
        left = self._expected
        if left is None or self._is_gathering or not self._can_reset():
            raise RunError(
                "out of memory while a layer was gathered from all ranks, or before the "
                "model ran once; free memory on this device, lower "
                "compute.tokens_per_microbatch, or use more ranks"
            )
        self._reset()
        with self._world.late_ranks_named():
            for number, step in left:
                self._world.come_to_collective()
                layer: Any = self._layers[number]
                layer.unshard()
                self._gathered_one(number, step)
                layer.reshard()

    @contextmanager
    def serving(self, model: nn.Module, spare: Callable[[], object]) -> Iterator[None]:
        """A context in which every call of the model is a round, on any rank.

        At its end a rank takes part in the others' rounds until all are there.

        Args:
            model: has the layers; its `forward` is replaced meanwhile.
            spare: calls the layers once.
        """
        own = model.forward

        @wraps(own)
        def forward(*inputs: Any, **options: Any) -> Any:
            self.is_work_left(True)
            return self.together(lambda: own(*inputs, **options), backward=False)

        model.forward = forward
        try:
            yield
            model.forward = own
            while self.is_work_left(False):
                self.together(spare, backward=False)
        finally:
            # The instance's attribute; the class's own is seen again.
            del model.forward

    def gathered(
        self, named: Iterable[tuple[str, Tensor]]
    ) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors, one at a time: every rank must ask for the same ones."""
        from torch.distributed.tensor import DTensor

        for name, tensor in named:
            if isinstance(tensor, DTensor):
                with self._world.late_ranks_named():
                    self._world.come_to_collective()
                    tensor = tensor.detach().full_tensor()
            yield name, tensor

    @property
    def gathered_bytes(self) -> int:
        """Bytes that a rank has of the largest layer while it is gathered and runs."""
        return self._bytes

    def _can_reset(self) -> bool:
        # torch 2.8 cannot make a layer forget a backward pass that was not finished.
        started = {step for _, step in self._made}
        return "backward" not in started or hasattr(self._layers[0], _RESET)

    def _reset(self) -> None:
        for root in self._roots:
            getattr(root, _RESET, root.reshard)()  # type: ignore[operator]

    def _gathered_one(self, number: int, step: str) -> None:
        """After the gather of a layer's parameters."""

    def _watch(self, number: int, layer: nn.Module) -> None:
        """Note a layer's gathers: before and after FSDP's own hooks make them."""

        def before(step: str) -> Callable[..., None]:
            return lambda *_: self._begin_gather(number, step)

        def after(step: str) -> Callable[..., None]:
            return lambda *_: self._end_gather(number, step)

        def hooked(hook: Callable[..., None]) -> Callable[..., None]:
            def register(_module: Any, _inputs: Any, output: Any) -> None:
                for tensor in output if isinstance(output, tuple | list) else (output,):
                    if isinstance(tensor, Tensor) and tensor.requires_grad:
                        tensor.register_hook(hook)

            return register

        layer.register_forward_pre_hook(before("forward"), prepend=True)
        layer.register_forward_pre_hook(after("forward"))
        # FSDP gathers for the backward pass in a hook on the output, in between.
        layer.register_forward_hook(hooked(before("backward")), prepend=True)
        layer.register_forward_hook(hooked(after("backward")))

    def _begin_gather(self, number: int, step: str) -> None:
        if not self._is_in_round:
            return
        if (number, step) in self._made and step == "backward":
            # By another output of the same layer, which is whole already.
            return
        self._world.come_to_collective()
        if self._expected is not None and (
            not self._expected or self._expected[0] != (number, step)
        ):
            self._refuse_order((number, step))
        self._is_gathering = True

    def _end_gather(self, number: int, step: str) -> None:
        if not self._is_in_round:
            return
        if not self._is_gathering:
            return
        self._gathered_one(number, step)
        self._is_gathering = False
        self._made.append((number, step))
        if self._expected is not None:
            self._expected.popleft()

    def _refuse_order(self, found: tuple[int, str] | None) -> None:
        expected = self._expected[0] if self._expected else None
        raise RunError(
            "the layers of the model did not run as in the first pass: expected "
            f"{_told(expected)}, found {_told(found)}; a model whose layers run in an "
            "order that depends on the tokens cannot be sharded: set compute.shard: none"
        )


class ShardedParameters(ShardedLayers):
    """A model of which a rank has a part of every parameter, and nothing whole.

    What lies outside the layers is gathered for as long as a microbatch takes: nothing
    is gathered for each chunk of logits. A part is a plain tensor in memory that it
    shares with FSDP's own; vectors over the parameters are vectors over the parts, and
    gradients are summed over ranks by the backward pass itself.

    Args:
        layers: see `ShardedLayers`.
        root: the module around all of the model; has a method `gathered`, registered
            with FSDP, that calls what it is given.
        slots: by layer, the root's last: every (module, attribute, name of the
            parameter) that is gathered with it.
        world: the ranks.
        group: number of ranks that share the model between them.
    """

    has_parts = True

    def __init__(
        self,
        layers: list[nn.Module],
        root: nn.Module,
        slots: list[list[tuple[nn.Module, str, str]]],
        world: World,
        group: int,
    ) -> None:
        super().__init__(layers, world)
        outside = sum(map(_whole_bytes, root.parameters())) - sum(
            _whole_bytes(p) for layer in layers for p in layer.parameters()
        )
        # Outside of the layers with tangents, while a layer comes.
        self._bytes += 3 * outside
        self._layers, self._roots = [*layers, root], [root]
        self._root: Any = root
        self._slots, self._group = slots, group
        self._names = [name for name, _ in root.causal_lm.named_parameters()]  # type: ignore[union-attr, operator]
        self.num_summed = world.world_size
        self._tangents: Mapping[str, Tensor] | None = None
        # By module: what the model room found of those whose weights were whole.
        self.normalisations: dict[nn.Module, Any] = {}
        # By name: FSDP's own tensors, and this rank's parts in the same memory.
        self._sharded: dict[str, Any] = {}
        self._parts: dict[str, nn.Parameter] = {}

    def find_parts(self, pass_over: Callable[[], object]) -> dict[str, nn.Parameter]:
        """This rank's part of every parameter, after one pass over the model.

        Args:
            pass_over: one forward pass, of any tokens; torch 2.8 moves the parts in it.
        """
        with torch.no_grad():
            self.together(lambda: self.within(pass_over), backward=False)
        found = {
            name: getattr(module, attribute)
            for slots in self._slots
            for module, attribute, name in slots
        }
        # In the model's own order, in which a trainer's optimizer has them.
        self._sharded = {name: found[name] for name in self._names}
        self._parts = {
            name: nn.Parameter(sharded.to_local().detach())
            for name, sharded in self._sharded.items()
        }
        return self._parts

    def region(self, name: str) -> tuple[torch.Size, tuple[slice, ...]]:
        """Shape of a whole parameter, and which of its rows this rank has."""
        shape = self._sharded[name].shape
        size = -(-shape[0] // self._group)
        start = min(self._world.rank % self._group * size, shape[0])
        stop = min(start + size, shape[0])
        assert self._parts[name].shape[0] == stop - start
        return shape, (slice(start, stop),)

    def together(self, call: Callable[[], Returned], backward: bool) -> Returned:
        """See `ShardedLayers.together`.

        Raises:
            RunError: also if the parts are not in FSDP's memory any more.
        """
        for name, sharded in self._sharded.items():
            if sharded.to_local().data_ptr() != self._parts[name].data_ptr():
                raise RunError(
                    f"the part of {name} that is stepped is not the one that the model "
                    "runs with: torch has moved it; set compute.shard: none"
                )
        try:
            return super().together(call, backward)
        except Exception:
            for sharded in self._sharded.values():
                sharded.grad = None
            raise

    def recover(self) -> None:
        """See `ShardedLayers.recover`.

        Raises:
            RunError: memory ran out in a round with a backward pass, whose sums over
                ranks cannot be undone on one of them.
        """
        if any(step == "backward" for _, step in self._recorded_kind()):
            raise RunError(
                "out of memory in a backward pass over a model in parts, which all ranks "
                "make together: lower compute.tokens_per_microbatch, and start again "
                "with --resume; what was finished is kept"
            )
        super().recover()

    def _recorded_kind(self) -> list[tuple[int, str]]:
        return [*self._made, *(self._expected or ())]

    def within(self, call: Callable[[], Returned]) -> Returned:
        """What a call gives; embedding, output layer and last norm are whole meanwhile."""
        number = len(self._layers) - 1
        self._begin_gather(number, "forward")

        def run() -> Returned:
            # A method that is registered with FSDP runs no hooks of modules.
            self._end_gather(number, "forward")
            if not self._is_in_round:
                self._gathered_one(number, "forward")
            return call()

        try:
            return self._root.gathered(run)
        finally:
            if not torch.is_grad_enabled():
                # torch 2.8 keeps the root's parameters gathered: stale after a step.
                self._root.reshard()

    @contextmanager
    def with_tangents(self, tangents: Mapping[str, Tensor]) -> Iterator[None]:
        """A context in which gathered parameters are dual; of this rank's parts, by name."""
        self._tangents = tangents
        try:
            yield
        finally:
            self._tangents = None

    def collect_gradients(self) -> None:
        """Move what a backward pass left, summed over ranks, to the parts' `.grad`."""
        for name, sharded in self._sharded.items():
            if sharded.grad is not None:
                found, part = sharded.grad.to_local(), self._parts[name]
                part.grad = found if part.grad is None else part.grad + found
                sharded.grad = None

    def totals(self, values: Iterable[float]) -> list[float]:
        """Sums over the parts of vectors; one collective."""
        local = torch.tensor(list(values), dtype=torch.float64)
        copies = self._world.world_size // self._group
        return (self._world.sum(local, "scalars") / copies).tolist()

    def whole(self, name: str, part: Tensor) -> Tensor:
        """The whole of a tensor that is divided as a parameter is; every rank asks."""
        from torch.distributed.tensor import DTensor

        like = self._sharded[name]
        with self._world.late_ranks_named():
            self._world.come_to_collective()
            return DTensor.from_local(
                part.to(like.device),
                like.device_mesh,
                like.placements,
                run_check=False,
                shape=like.shape,
                stride=like.stride(),
            ).full_tensor()

    def joined(self, vector: Tensor) -> Tensor | None:
        """The whole of a flat vector over the parts, on rank 0; every rank asks.

        One parameter at a time: no other rank ever has more than one of them.
        """
        sizes = [part.numel() for part in self._parts.values()]
        whole = vector.new_empty(
            sum(sharded.numel() for sharded in self._sharded.values())
            if self._world.is_main
            else 0
        )
        start = 0
        for (name, part), piece in zip(self._parts.items(), vector.split(sizes)):
            found = self.whole(name, piece.view(part.shape)).reshape(-1)
            if self._world.is_main:
                whole[start : start + len(found)] = found
                start += len(found)
        return whole if self._world.is_main else None

    def cut(self, vector: "Sliced") -> Tensor:
        """This rank's part of a flat vector; no more of it is read."""
        pieces, start = [], 0
        for name in self._parts:
            shape, (rows,) = self.region(name)
            row = shape.numel() // shape[0]
            first, last = start + rows.start * row, start + rows.stop * row
            pieces.append(vector[first:last].clone())
            start += shape.numel()
        return torch.cat(pieces)

    def unsharded(self) -> Iterator[list[nn.Module]]:
        """The modules whose parameters are gathered together, while they are."""
        for layer, slots in zip(self._layers, self._slots, strict=True):
            unit: Any = layer
            unit.unshard()
            yield list(dict.fromkeys(module for module, _, _ in slots))
            unit.reshard()

    def _gathered_one(self, number: int, step: str) -> None:
        """Gather the tangents beside the parameters, into the modules' own slots."""
        if self._tangents is None or step == "backward":
            return
        duals: dict[str, Tensor] = {}
        for module, attribute, name in self._slots[number]:
            if name not in duals:
                primal = module._parameters[attribute]
                assert primal is not None
                tangent = self.whole(name, self._tangents[name]).to(primal)
                duals[name] = forward_ad.make_dual(primal.detach(), tangent)
            # nn.Module refuses a tensor that is no Parameter.
            module._parameters[attribute] = duals[name]  # type: ignore[assignment]


# Not in every version of torch.
_RESET = "reset_iter_state"


def _told(gather: tuple[int, str] | None) -> str:
    return "the end" if gather is None else f"layer {gather[0] + 1} {gather[1]}"


def _whole_bytes(parameter: Tensor) -> int:
    return parameter.numel() * parameter.element_size()


Settle = Callable[[Iterable[nn.Parameter]], None]


def shard_base(
    layers: list[nn.Module],
    world: World,
    device: torch.device,
    group: int,
    settle: Settle = lambda parameters: None,
) -> ShardedLayers:
    """Shard the frozen matrices of these layers; what else they have stays whole.

    Whole on every rank are what is trained, norms and biases, and parameters of another
    dtype than most.

    Args:
        layers: of the model, in any order; those of nobody are gathered together.
        device: of this rank's model.
        group: number of ranks that share the model between them.
        settle: called with the parameters of a layer before they are cut.
    """
    from torch.distributed.fsdp import fully_shard

    mesh = _mesh(world, device, group)
    for layer in layers:
        settle(layer.parameters())
        frozen = [p for p in layer.parameters() if not p.requires_grad and p.dim() > 1]
        dtypes = [p.dtype for p in frozen]
        usual = max(dtypes, key=dtypes.count, default=None)
        cut = {id(p) for p in frozen if p.dtype == usual}
        whole = {p for p in layer.parameters() if id(p) not in cut}
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    return ShardedLayers(layers, world)


def without_parts(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Those that are not cut yet, or stay whole."""
    from torch.distributed.tensor import DTensor

    return [p for p in parameters if not isinstance(p, DTensor)]


def shard_full(
    layers: list[nn.Module],
    root: nn.Module,
    world: World,
    device: torch.device,
    group: int,
    settle: Settle = lambda parameters: None,
) -> ShardedParameters:
    """Shard every parameter of a model that is trained whole.

    Args:
        layers: of the model, each gathered for itself.
        root: the module around the model, with a method `gathered`.
        device: of this rank's model.
        group: number of ranks that share the model between them.
        settle: called with the parameters of a layer, the root's own last, before they
            are cut.
    """
    from torch.distributed.fsdp import (
        FSDPModule,
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    names = {id(p): name for name, p in root.causal_lm.named_parameters()}  # type: ignore[union-attr, operator]
    inside = {id(module) for layer in layers for module in layer.modules()}
    slots = [
        [
            (module, attribute, names[id(parameter)])
            for module in unit.modules()
            if unit is not root or id(module) not in inside
            for attribute, parameter in module._parameters.items()
            if parameter is not None
        ]
        for unit in (*layers, root)
    ]
    mesh = _mesh(world, device, group)
    # Sums over ranks are never narrower than float32.
    widths = {p.dtype for p in root.parameters() if p.dtype.itemsize < 4}
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32 if widths else None)
    for unit in (*layers, root):
        settle(without_parts(unit.parameters()))
        # The root's default would keep it gathered, and stale after a step.
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
        assert isinstance(unit, FSDPModule)
        # A sum over ranks, and not the mean that FSDP takes.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(root, "gathered")
    return ShardedParameters(layers, root, slots, world, group)


def _mesh(world: World, device: torch.device, group: int) -> "DeviceMesh":
    """The ranks, in groups of so many: between groups the parts are repeated."""
    from torch.distributed.device_mesh import init_device_mesh

    with announced_as_errors():
        if group == world.world_size:
            return init_device_mesh(device.type, (group,))
        shape = (world.world_size // group, group)
        names = ("repeated", "sharded")
        return init_device_mesh(device.type, shape, mesh_dim_names=names)


def group_size(asked: str | int, world: World, ranks_here: int) -> int:
    """How many ranks share one model between them.

    Args:
        asked: `compute.shard_group`: all, node, or a number.
        ranks_here: number of ranks on this machine.

    Raises:
        InputError: the ranks cannot be divided into such groups.
    """
    found = {"all": world.world_size, "node": ranks_here}
    size = asked if isinstance(asked, int) else found[asked]
    if size > world.world_size or world.world_size % size:
        raise InputError(
            f"compute.shard_group: {asked}: expected groups of equal size, found "
            f"{world.world_size} ranks and groups of {size}; start a multiple of {size} "
            "ranks, or set compute.shard_group: all"
        )
    return size
