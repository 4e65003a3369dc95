"""Put a mixture on any tree of ``torch.nn`` modules, and take it off without a trace.

Forward methods are replaced on the instances (hooks are ignored by a model that was compiled before they came). The
model's root notes the text conditioning, blocks open and close the gates inside them, layers add the gated experts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from .bank import Bank
from .errors import MergeError
from .gates import Gate, GateSet, wide
from .mixture import Mixture
from .scopes import NETWORK, uncompiled
from .stack import Stack, fit_batch

# What models call their text conditioning (B, tokens, features), and the stream of the picture or text in a block.
_TEXT = ("encoder_hidden_states", "context")
_STREAM = ("img", "x", "hidden_states")
_CACHE = ("past_key_values", "past_key_value", "layer_past")  # keys and values of a language model's earlier tokens

Measure = Callable[[str, Tensor, "Tensor | None"], None]


class Watcher(Protocol):
    """Is told what the gates do. Never from inside a compiled model."""

    def start(self, arguments: Mapping[str, Any]) -> None:
        """A pass of the whole model begins, called with these keyword arguments."""
        ...

    def seen(self, scope: str, value: Tensor) -> None:
        """A gate opened to `value`, ``(B, N)`` or ``(1, N)`` float32; with its graph while gradients are taken."""
        ...


def attach(model: nn.Module, mixture: Mixture | Bank, *, checkpointing: bool = False) -> Attachment:
    """Put a mixture on a model. Use it in a ``with`` block, or call `Attachment.detach` at the end.

    Linear layers and convolutions are mixed, quantised and offloaded ones too: only their inputs and outputs are used.

    Args:
        model: A U-Net, a transformer, a language model: whatever holds the layers the experts change.
        mixture: The experts and gates; a `Bank` where one was built for this model already.
        checkpointing: Recompute blocks in the backward pass instead of keeping what they computed (for training).

    Raises:
        MergeError: The experts or gates are for another model.
    """
    if isinstance(mixture, Mixture):
        mixture = Bank(model, mixture)
        parameter = next(model.parameters(), None)
        if parameter is not None and parameter.device.type != "meta":
            mixture.to(parameter.device)
    return Attachment(model, mixture, checkpointing=checkpointing)


class _Site:
    """One scope at work: its gate, and the gate's value in the call that is going on."""

    def __init__(self, name: str, gate: Gate | None) -> None:
        self.name, self.gate = name, gate
        self.layer = ""  # see `Gate`
        self.value: Tensor | None = None


class _State:
    """What the replaced forward methods share."""

    def __init__(self, bank: Bank) -> None:
        self.bank, self.reads = bank, bank.gates.settings.reads
        self.sites = {scope.name: _Site(scope.name, None) for scope in bank.scopes.values()}
        self.use(bank.gates)
        self.held: Tensor | None = None
        self.watch: Watcher | None = None
        self.measure: Measure | None = None
        self.spreads: dict[Any, tuple[Tensor, Tensor]] = {}

    def use(self, gates: GateSet) -> None:
        self.bank.gates = gates
        for name, site in self.sites.items():
            site.gate = gates.get(name)

    def set(self, site: _Site, value: Tensor) -> Tensor:
        site.value = value
        if self.watch is not None and not torch.compiler.is_compiling():
            self.watch.seen(site.name, value)
        return value

    def fixed(self, site: _Site, like: Tensor) -> Tensor | None:
        """The value of a gate that reads nothing: one held by hand, or the even one of an untrained gate."""
        if self.held is not None:
            return self.held.to(like.device)
        if site.gate is None and self.measure is None:
            return self.bank.gates.even(like)
        return None

    def read(self, site: _Site, features: Tensor, owner: Tensor | None = None) -> Tensor:
        if self.measure is not None:
            self.measure(site.name, features, owner)
        if site.gate is None:
            return self.bank.gates.even(features)
        if features.shape[-1] != site.gate.features:
            flat = self.reads == "flat"
            raise MergeError(
                "A gate reads something of another size than it was trained with.",
                module=site.name or "(network)",
                expected=f"{site.gate.features} numbers",
                found=features.shape[-1],
                remedy="sample at the image size the gates were trained with: they read every position apart (flat)"
                if flat
                else "use the gates with the base model they were trained on",
            )
        return site.gate(features)

    def hidden(self, site: _Site, path: str, x: Tensor, *, image: bool) -> Tensor:
        """Open a gate that reads `x`, what a block or the layer at `path` gets; `image`: with channels first."""
        site.layer = path
        value = self.fixed(site, x)
        return self.set(site, self.read(site, pooled(x, channels_first=image)) if value is None else value)

    def open(self, site: _Site, path: str, stack: Stack, x: Tensor, z: Tensor) -> Tensor:
        """The first adapted layer of a scope runs: find the gate's value for the rest of the call."""
        if self.reads == "hidden":
            return self.hidden(site, path, x, image=bool(stack.kernel))
        value = self.fixed(site, x)
        if value is None and self.reads == "text":
            raise _without_text()
        if value is None and site.gate is not None and site.gate.features == 0:
            value = site.gate(x.new_zeros(x.shape[0], 0))  # all it read was of experts that were switched off
        if value is None:  # experts, flat
            f, owner = stack.by_expert(stack.normalised(z, self.bank.experts))
            if self.reads == "flat":
                value = self.read(site, f.flatten(1), owner.repeat(f.shape[1]))
            else:
                value = self.read(site, f.mean(1), owner)
        return self.set(site, value)

    def end(self) -> None:
        """Forget the gates' values: nothing of a pass is kept alive, or used by the next."""
        for site in self.sites.values():
            site.value = None
        self.spreads.clear()

    def spread(self, g: Tensor, stack: Stack, z: Tensor) -> Tensor:
        """`Stack.spread`, once a pass for all layers that ask for the same: small layers wait for every operation."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return stack.spread(g, z)  # kept, it would keep its graph
        key = (id(g), stack.layout, z.shape[0], z.ndim, z.dtype, z.device)
        if key not in self.spreads:
            self.spreads[key] = g, stack.spread(g, z)  # with `g`, whose id nothing else may get meanwhile
        return self.spreads[key][1]

    def start(self, text: Tensor | None, arguments: Mapping[str, Any]) -> None:
        """A pass of the whole model begins."""
        self.end()
        if self.watch is not None and not torch.compiler.is_compiling():
            self.watch.start(arguments)
        if self.reads != "text" or self.held is not None:
            return
        if text is None:
            if self.measure is None and not self.bank.gates.trained:
                return  # even, whatever is read
            raise _without_text()
        f = wide(text).mean(1)
        if self.measure is not None:
            for name in self.sites:
                self.measure(name, f, None)
        if self.bank.gates.trained:
            first = self.sites[self.bank.gates.names[0]]
            assert first.gate is not None
            if f.shape[-1] != first.gate.features:
                self.read(first, f)  # raises
            for name, value in zip(self.bank.gates.names, self.bank.gates.values(f), strict=True):
                self.set(self.sites[name], value)
        even = self.bank.gates.even(f)
        for site in self.sites.values():
            if site.value is None:
                self.set(site, even)


def _without_text() -> MergeError:
    return MergeError(
        "The gates read the text conditioning, and this model got none.",
        expected=f"an argument {' or '.join(_TEXT)}",
        remedy="train gates that read hidden or experts",
    )


class _Forward:
    """A forward method in place of a module's own, which it calls.

    Offloading hooks (accelerate's) keep the method they wrap as `_old_forward` and put it back as the module's own
    whenever they are renewed, which diffusers does after every picture. So we go below them.
    """

    def __init__(self, module: nn.Module, state: _State) -> None:
        self.module, self.state, self.active = module, state, True
        slot = "_old_forward" if "_old_forward" in module.__dict__ else "forward"
        self.previous: Any = module.__dict__.get(slot)
        self.inner: Callable[..., Any] = getattr(module, slot)
        setattr(module, slot, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    @property
    def __signature__(self) -> inspect.Signature:
        """The module's own: pipelines and `generate` look there for what a model takes."""
        return inspect.signature(self.inner)

    def remove(self) -> None:
        self.active = False  # should another program have put something on top, this only passes calls on
        previous = self.previous
        while isinstance(previous, _Forward) and not previous.active:
            previous = previous.previous
        own = self.module.__dict__
        if own.get("forward") is self and previous is None:
            del self.module.forward
        elif own.get("forward") is self:
            self.module.forward = previous
        if own.get("_old_forward") is self:  # also if the hooks came after us
            setattr(self.module, "_old_forward", previous or type(self.module).forward.__get__(self.module))  # noqa: B010


class _Layer(_Forward):
    """Adds the gated experts to a layer's output."""

    def __init__(self, module: nn.Module, state: _State, path: str, stack: Stack, site: _Site) -> None:
        self.path, self.stack, self.site = path, stack, site
        super().__init__(module, state)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        y = self.inner(*args, **kwargs)
        if not self.active:
            return y
        x = (args[0] if args else next(iter(kwargs.values()))).to(y.device)
        z = self.stack.down(self.module, x)
        g = self.site.value
        if g is None:
            g = self.state.open(self.site, self.path, self.stack, x, z)
        return self.stack.add(y, z * self.state.spread(g, self.stack, z))


class _Reader(_Forward):
    """Opens a gate where it read in training, at a layer that only experts changed which are switched off now."""

    def __init__(self, module: nn.Module, state: _State, path: str, site: _Site) -> None:
        self.path, self.site, self.image = path, site, isinstance(module, _ConvNd)
        super().__init__(module, state)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.active and self.site.value is None:
            x = args[0] if args else next(iter(kwargs.values()))
            self.state.hidden(self.site, self.path, x, image=self.image)
        return self.inner(*args, **kwargs)


class _Block(_Forward):
    def __init__(self, module: nn.Module, state: _State, path: str, inside: Sequence[_Site], checkpointing: bool):
        self.path, self.inside, self.checkpointing = path, inside, checkpointing
        self.own = next((site for site in inside if site.name == path), None)
        # a block around other blocks (of a U-Net) would run them once more per LoRA for each of its own passes
        around = any(other.startswith(f"{path}.") for other in state.bank.blocks)
        self.output = state.bank.mixing == "output" and self.own is not None and not around
        super().__init__(module, state)
        self.arguments, self.cache = _Arguments(self.inner, _STREAM), _Arguments(self.inner, _CACHE)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active:
            return self.inner(*args, **kwargs)
        recompute = self.checkpointing and torch.is_grad_enabled()
        if (recompute or self.output) and self.cache.find(args, kwargs) is not None:
            raise MergeError(
                "A block that runs more than once would write into the key-value cache each time.",
                module=self.path,
                remedy="call the model with use_cache=False, or use delta mixing without checkpointing",
            )
        return self._recomputed(args, kwargs) if recompute else self._pass(*args, **kwargs)

    def _pass(self, *args: Any, **kwargs: Any) -> Any:
        state = self.state
        if state.reads != "text":
            for site in self.inside:
                site.value = None
        if self.output:
            return self._output_mixed(args, kwargs)
        if self.own is not None and state.reads == "hidden":
            x = self.arguments.stream(args, kwargs)
            state.hidden(self.own, "", x, image=x.ndim > 3)
        return self.inner(*args, **kwargs)

    def _output_mixed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``F(x) + sum_i g_i (F_i(x) - F(x))``: the block without experts, and once under each alone."""
        state, site = self.state, self.own
        assert site is not None
        n = state.bank.experts
        gate, x = site.value, self.arguments.stream(args, kwargs)
        alone = torch.eye(n, device=x.device)
        outputs: list[list[Any]] = []
        tree = None
        for g in (torch.zeros(1, n, device=x.device), *alone.split(1)):
            site.value = g
            copied_args, copied_kwargs = _copied((args, kwargs))  # some blocks write into their inputs
            flat, tree = pytree.tree_flatten(self.inner(*copied_args, **copied_kwargs))
            outputs.append(flat)
        base, own = outputs[0], outputs[1:]
        if gate is None:
            gate = state.fixed(site, x)
        if gate is None:
            if state.reads == "hidden":
                gate = state.read(site, _pooled_stream(x))
            else:
                gate = state.read(site, *self._outputs_read(base, own))
        state.set(site, gate)
        mixed = [
            value + sum(_scaled(fit_batch(gate, value.shape[0])[:, i], own[i][j] - value) for i in range(n))
            if isinstance(value, Tensor) and value.is_floating_point()
            else value
            for j, value in enumerate(base)
        ]
        assert tree is not None
        return pytree.tree_unflatten(mixed, tree)

    def _outputs_read(self, base: list[Any], own: list[list[Any]]) -> tuple[Tensor, Tensor]:
        """The experts' outputs as published: concatenated, normalised, per position or in the mean."""
        j = next(j for j, value in enumerate(base) if isinstance(value, Tensor) and value.is_floating_point())
        deltas = [wide(_positions(flat[j] - base[j])) for flat in own]
        E = torch.cat(deltas, -1)  # (B, T, N d)
        E = E / E.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-6)
        owner = torch.arange(len(own), device=E.device).repeat_interleave(deltas[0].shape[-1])
        if self.state.reads == "flat":
            return E.flatten(1), owner.repeat(E.shape[1])
        return E.mean(1), owner

    def _recomputed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Keep only the inputs; run the block again in the backward pass. Right for blocks that work in place."""
        flat, tree = pytree.tree_flatten((args, kwargs))
        at = [i for i, value in enumerate(flat) if isinstance(value, Tensor)]
        sites = [site for site in self.state.sites.values() if site.value is not None]
        watch, measure, held = self.state.watch, self.state.measure, self.state.held
        opened: dict[str, Tensor] = {}  # the gates that open inside: with a graph only as outputs, too
        shape: Any = None

        def run(anchor: Tensor, *tensors: Tensor) -> tuple[Any, ...]:
            nonlocal opened, shape
            if not self.active:
                raise MergeError(
                    "The mixture was taken off before the backward pass, which runs blocks again.",
                    module=self.path,
                    remedy="call backward() inside the `with attach(..)` block",
                )
            state, seen = self.state, _Opened()
            everywhere = list(state.sites.values())
            outer = [site.value for site in everywhere], state.watch, state.measure, state.held
            state.watch, state.measure, state.held = None if watch is None else seen, measure, held
            for site, value in zip(sites, tensors, strict=False):
                site.value = value
            values = list(flat)
            for i, value in zip(at, tensors[len(sites) :], strict=True):
                values[i] = value.clone()
            inner_args, inner_kwargs = pytree.tree_unflatten(values, tree)
            try:
                with exact_gradients():
                    leaves, shape = pytree.tree_flatten(self._pass(*inner_args, **inner_kwargs))
                opened = seen.values
                # only tensors get gradients, not what holds them; copies, because views must not be written into later
                return tuple(_copied([anchor, *leaves, *opened.values()]))
            finally:
                for site, value in zip(everywhere, outer[0], strict=True):  # no other block may see this graph
                    site.value = value
                _, state.watch, state.measure, state.held = outer

        inside = [site.value for site in sites] + [flat[i] for i in at]
        for i in at:
            flat[i] = None  # the library keeps them
        anchor = torch.zeros((), requires_grad=True)  # an input and output with a gradient: the library asks for one
        random = self.module.training  # dropout must fall alike both times
        found = checkpoint(run, anchor, *inside, use_reentrant=True, preserve_rng_state=random)
        found = list(found)[1:]  # type: ignore[call-overload]
        leaves = len(found) - len(opened)
        if watch is not None:
            for name, value in zip(opened, found[leaves:], strict=True):
                watch.seen(name, value)
        return pytree.tree_unflatten(found[:leaves], shape)


class _Opened:
    """Notes the gates that open in a block. A `Watcher`."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def start(self, arguments: Mapping[str, Any]) -> None:
        pass

    def seen(self, scope: str, value: Tensor) -> None:
        self.values[scope] = value


class _Root(_Forward):
    def __init__(self, module: nn.Module, state: _State) -> None:
        super().__init__(module, state)
        self.arguments = _Arguments(self.inner, _TEXT)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.active:
            text = self.arguments.find(args, kwargs)
            self.state.start(text if isinstance(text, Tensor) else None, kwargs)
        output = self.inner(*args, **kwargs)
        if self.active:
            self.state.end()
        return output


class _Arguments:
    """Finds one of a forward method's arguments by name, however it is passed."""

    def __init__(self, forward: Callable[..., Any], names: Sequence[str]) -> None:
        try:
            parameters = inspect.signature(forward).parameters.values()
        except (TypeError, ValueError):  # another program's wrapper that does not tell: by keyword only
            parameters = ()
        known = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        self.names = names
        self.positions = [known.index(name) for name in names if name in known]

    def find(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for name in self.names:
            if kwargs.get(name) is not None:
                return kwargs[name]
        for position in self.positions:
            if position < len(args):
                return args[position]
        return None

    def stream(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The stream of the picture (or the text): by name, else the last of the sequences given by position."""
        found = self.find(args, kwargs)
        if isinstance(found, Tensor):
            return found
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        sequences = [value for value in args if isinstance(value, Tensor) and value.ndim > 2]
        return (sequences[-1:] or tensors)[0]


class Attachment:
    """A mixture at work on a model.

    Args:
        model: The module tree. bank: Built for it. checkpointing: See `attach`.
    """

    def __init__(self, model: nn.Module, bank: Bank, *, checkpointing: bool = False) -> None:
        self.model, self.bank = uncompiled(model), bank
        self._state = state = _State(bank)
        outside = NETWORK in state.sites and state.reads in ("hidden", "experts", "flat")
        if checkpointing and outside and bank.gates.settings.granularity == "network":
            raise MergeError(
                "One gate for the whole network that reads its first layer cannot be trained with checkpointing.",
                remedy="switch checkpointing off, or choose gates that read text or a finer granularity",
            )
        blocks = bank.blocks if state.reads != "text" or bank.mixing == "output" or checkpointing else {}
        readers = {
            site.gate.layer: site
            for site in state.sites.values()
            if state.reads == "hidden" and site.gate is not None and site.gate.layer not in ("", *bank.stacks)
        }
        modules = {path: self.model.get_submodule(path) for path in (*blocks, *readers, *bank.stacks)}
        self._forwards: list[_Forward] = [_Root(self.model, state)]
        for path, inside in blocks.items():
            sites = [state.sites[name] for name in inside]
            self._forwards.append(_Block(modules[path], state, path, sites, checkpointing))
        self._forwards += [_Reader(modules[path], state, path, site) for path, site in readers.items()]
        for path, stack in bank.stacks.items():
            self._forwards.append(_Layer(modules[path], state, path, stack, state.sites[bank.scopes[path].name]))

    @property
    def left_out(self) -> tuple[str, ...]:
        """Parts of the experts that are not mixed, each with the reason."""
        return self.bank.left_out

    @property
    def layers_read(self) -> dict[str, str]:
        """Scope -> path of the layer at which its gate read in the last pass, see `Gate`."""
        return {site.name: site.layer for site in self._state.sites.values()}

    @contextmanager
    def hold(self, values: Tensor | Sequence[float]) -> Generator[None]:
        """Hold all gates at given values: ``(N,)``, or ``(B, N)`` for a batch of samples."""
        device = next(self.bank.buffers()).device  # copied there now: copies in the pass would make a GPU wait
        held = torch.as_tensor(values, dtype=torch.float32, device=device)
        if held.shape[-1:] != (self.bank.experts,):
            raise MergeError("Every LoRA needs a value.", expected=self.bank.experts, found=tuple(held.shape))
        before, self._state.held = self._state.held, held if held.ndim == 2 else held[None]
        try:
            yield
        finally:
            self._state.held = before

    def use(self, gates: GateSet) -> None:
        """Go on with other gates, for the same experts and settings; the bank's too."""
        self._state.use(gates)

    @contextmanager
    def part(self, rows: Sequence[int]) -> Generator[None]:
        """Only these samples of the batch run inside the block: of values held for all of them, theirs."""
        before = self._state.held
        if before is not None and before.shape[0] > 1:
            self._state.held = before[list(rows)]
        try:
            yield
        finally:
            self._state.held = before

    @contextmanager
    def watch(self, watcher: Watcher) -> Generator[None]:
        """Tell `watcher` what the gates do inside the block."""
        before, self._state.watch = self._state.watch, watcher
        try:
            yield
        finally:
            self._state.watch = before

    @contextmanager
    def measure(self, seen: Measure) -> Generator[None]:
        """Tell of everything the gates read: ``seen(scope, features (B, F), owner (F,) or None)``."""
        before, self._state.measure = self._state.measure, seen
        try:
            yield
        finally:
            self._state.measure = before

    def detach(self) -> None:
        """Take the mixture off. The model is what it was, bit for bit; calling this again does nothing."""
        for forward in reversed(self._forwards):
            forward.remove()
        self._forwards = []

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


@contextmanager
def exact_gradients() -> Generator[None]:
    """Gradients that stay right where blocks write into tensors kept for the backward pass (``img += ..``)."""
    with torch.autograd.graph.saved_tensors_hooks(_kept, lambda t: t):
        yield


def _kept(t: Tensor) -> Tensor:
    """What to keep for the backward pass: a copy, but of weights, which nobody writes into, the tensor itself."""
    return t if isinstance(t if t._base is None else t._base, nn.Parameter) else t.clone()


def pooled(x: Tensor, *, channels_first: bool) -> Tensor:
    """Mean over all positions: ``(B, channels)``, at least float32."""
    x = wide(x)
    if channels_first:
        return x.flatten(2).mean(2) if x.ndim > 2 else x
    return x.flatten(1, -2).mean(1) if x.ndim > 2 else x


def _pooled_stream(x: Tensor) -> Tensor:
    return pooled(x, channels_first=x.ndim > 3)


def _positions(x: Tensor) -> Tensor:
    """``(B, T, d)`` of a sequence or of an image with channels first."""
    return x.flatten(2).mT if x.ndim > 3 else x if x.ndim == 3 else x[:, None]


def _scaled(g: Tensor, x: Tensor) -> Tensor:
    return g.to(x).view(-1, *(1 for _ in range(x.ndim - 1))) * x


def _copied(tree: Any) -> Any:
    return pytree.tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, tree)
