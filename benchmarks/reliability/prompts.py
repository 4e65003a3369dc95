"""Prompts of a soak test: images through all nodes, prompts to be cancelled, prompts to be refused.

Kind and number of a prompt determine its graph, on any server with the files of `lay_out`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.comfy import loras, tiny
from tests.comfy.graph import Graph, Link
from tests.comfy.server import lay_out as folders

FLUX = ("flux_kohya", "flux_kohya_2", "flux_split")
CHANGING, VERSIONS = "changing.safetensors", 3  # a file that is replaced while the server runs
_TEXTS = ("ember style", "heart", "heart in ember style", "a dog")
_RANKED = {
    "svd": {},
    "ties": {"density": 0.5, "sign_election": "total"},
    "dare": {"density": 0.5, "seed": 0},
    "knots": {"density": 0.5, "sign_election": "frequency"},
}


@dataclass(frozen=True)
class SoakPrompt:
    """A prompt with its expected outcome.

    Args:
        kind: Name of the kind.
        graph: Graph to queue.
        node: Node that saves the image; in a prompt to be cancelled, the node to interrupt.
        version: Version of `CHANGING` that the prompt needs; ``None`` if it does not use the file.
        error: Part of the error message, for a prompt to be refused.
    """

    kind: str
    graph: Graph
    node: str
    version: int | None = None
    error: str = ""


def lay_out(base: Path, pack: Path | None) -> None:
    """Create models, LoRAs and, if `pack` is given, our nodes for a server."""
    folders(base, pack)
    tiny.write_models(base)
    write_files(base)


def write_files(base: Path) -> None:
    """Write the LoRAs that the prompts name, valid and broken ones."""
    folder = base / "models" / "loras"
    loras.write_all(folder)
    for i in range(2):
        loras.write(folder / f"slow_{i}.safetensors", loras.kohya(loras.FLUX_FUSED, 96, 96.0, 40 + i))
    broken = loras.kohya(loras.FLUX_FUSED, 2, 2.0, 51)
    loras.write(folder / "cut.safetensors", broken)
    (folder / "cut.safetensors").write_bytes((folder / "cut.safetensors").read_bytes()[:-1000])
    broken["lora_unet_double_blocks_0_img_mlp_0.lora_up.weight"][3, 1] = float("nan")
    loras.write(folder / "nan.safetensors", broken)
    change(base, 0)


def change(base: Path, version: int) -> None:
    """Replace `CHANGING` by one of its versions."""
    state = loras.kohya(loras.FLUX_FUSED, 2 + version, 2.0, 60 + version)
    loras.write(base / "models" / "loras" / CHANGING, state)


# ---- pictures


def picture(number: int) -> SoakPrompt:
    """Return the prompt of an image; the number selects the kind and draws LoRAs, strengths, ranks and texts."""
    kind = list(_PICTURES)[number % len(_PICTURES)]
    rng = Random(f"{kind}/{number}")
    graph = Graph("sd15" if kind in ("sd15", "sd15 mix") else "flux")
    model, clip, version = _PICTURES[kind](graph, rng)
    node = graph.picture(model, clip, rng.choice(_TEXTS))
    if kind == "regions":
        _in_two_regions(graph)
    return SoakPrompt(kind, graph, node, version)


_Parts = tuple[Link | None, Link | None, int | None]  # MODEL and CLIP (None: as loaded), version of `CHANGING`


def _pair(graph: Graph, rng: Random) -> list[Link]:
    return [graph.load(f"{name}.safetensors", _strength(rng), _strength(rng)) for name in rng.sample(FLUX, 2)]


def _strength(rng: Random) -> float:
    return rng.choice((-1.0, 0.3, 0.7, 1.0, 1.6))


def _applied(graph: Graph, rng: Random, lora: Link) -> _Parts:
    return *graph.apply(lora, _strength(rng), _strength(rng)), None


def _plain(graph: Graph, rng: Random) -> _Parts:
    return None, None, None


def _stock(graph: Graph, rng: Random) -> _Parts:
    return *graph.stock(*(f"{name}.safetensors" for name in rng.sample(FLUX, 2)), strengths=[0.6, -0.8]), None


def _apply(graph: Graph, rng: Random) -> _Parts:
    return _applied(graph, rng, graph.load(f"{rng.choice(FLUX)}.safetensors", _strength(rng)))


def _changed(graph: Graph, rng: Random) -> _Parts:
    return *graph.apply(graph.load(CHANGING)), rng.randrange(VERSIONS)


def _changed_mix(graph: Graph, rng: Random) -> _Parts:
    mix = graph.mix(graph.load(CHANGING), graph.load("flux_split.safetensors", 0.8))
    return mix, None, rng.randrange(VERSIONS)


def _lego(graph: Graph, rng: Random) -> _Parts:
    settings = {"rank": rng.choice(("2", "6", "1x", "90%", "auto")), "geometry": rng.choice(("rank-one", "paper"))}
    return _applied(graph, rng, graph.lego(*_pair(graph, rng), **settings))


def _merge(graph: Graph, rng: Random) -> _Parts:
    method = rng.choice(("concat", "linear", *_RANKED))
    if method == "linear":
        return _applied(graph, rng, graph.merge(method, *[graph.load("flux_kohya.safetensors", 0.5)] * 2))
    settings = {"rank": rng.choice(("3", "1x")), **_RANKED[method]} if method in _RANKED else {}
    return _applied(graph, rng, graph.merge(method, *_pair(graph, rng), **settings))


def _converted(graph: Graph, rng: Random) -> _Parts:
    kind = rng.choice(("loha", "lokr", "dora", "full", "glora"))
    odd = graph.load(f"{kind}.safetensors", _strength(rng), convert_rank=rng.choice((8, 32)))
    return _applied(graph, rng, graph.lego(odd, graph.load("flux_kohya.safetensors")))


def _calibrated(graph: Graph, rng: Random) -> _Parts:
    pair = _pair(graph, rng)
    merged = graph.lego(*pair)
    graph.nodes[merged[0]]["inputs"]["statistics"] = graph.calibrate(*pair, pictures=1, seed=rng.randrange(3))
    return _applied(graph, rng, merged)


def _mix(graph: Graph, rng: Random) -> _Parts:
    settings = {"granularity": rng.choice(("network", "block", "layer", "matrix")), "scale": rng.choice((0.5, 1.0))}
    off = rng.choice(("", "", "1", "2"))
    return graph.mix(*_pair(graph, rng), switched_off=off, **settings), None, None


def _mix_of_outputs(graph: Graph, rng: Random) -> _Parts:
    return graph.mix(*_pair(graph, rng), mixing="output"), None, None


def _gated(graph: Graph, rng: Random) -> _Parts:
    pair, reads = _pair(graph, rng), rng.choice(("text", "hidden", "experts"))
    short = {"steps": 3, "pictures": 2, "examples": 8, "batch_size": 4}
    gates = graph.train(*pair, reads=reads, activation=rng.choice(("sigmoid", "softmax-null")), **short)
    return graph.mix(*pair, gates=gates), None, None


def _routed(graph: Graph, rng: Random) -> _Parts:
    pair = _pair(graph, rng)
    return graph.mix(*pair, gates=graph.train(*pair, objective="router")), None, None


def _frozen(graph: Graph, rng: Random) -> _Parts:
    text = graph.add("CLIPTextEncode", text=rng.choice(_TEXTS), clip=graph.clip)
    inputs = {"model": graph.mix(*_pair(graph, rng)), "positive": text, "latent_image": graph.empty()}
    return _applied(graph, rng, graph.add("LegoMoLE_FreezeToLoRA", **inputs, method="concat", steps=2, seed=1))


def _sd15(graph: Graph, rng: Random) -> _Parts:
    names = ("sd15_kohya.safetensors", "sd15_diffusers.safetensors")
    return _applied(graph, rng, graph.lego(*(graph.load(name, _strength(rng), _strength(rng)) for name in names)))


def _sd15_mix(graph: Graph, rng: Random) -> _Parts:
    names = ("sd15_kohya.safetensors", "sd15_diffusers.safetensors")
    mix = graph.mix(*(graph.load(name, _strength(rng), _strength(rng)) for name in names), clip=graph.clip)
    return mix, [mix[0], 1], None


_PICTURES: dict[str, Callable[[Graph, Random], _Parts]] = {
    "plain": _plain, "stock": _stock, "apply": _apply, "changed": _changed, "lego": _lego, "merge": _merge, "mix": _mix,
    "mix of outputs": _mix_of_outputs, "gates": _gated, "regions": _mix, "router": _routed, "changed mix": _changed_mix,
    "frozen": _frozen, "converted": _converted, "calibrated": _calibrated, "sd15": _sd15, "sd15 mix": _sd15_mix,
}  # fmt: skip


def _in_two_regions(graph: Graph) -> None:
    """Add a prompt in a masked half and another one in an area."""
    sampler = graph.nodes["KSampler0"]["inputs"]
    masks = [graph.add("SolidMask", value=value, width=64, height=64) for value in (0.0, 1.0)]
    half = graph.add("MaskComposite", destination=masks[0], source=masks[1], x=32, y=0, operation="add")
    heart, ember = (graph.add("CLIPTextEncode", text=text, clip=graph.clip) for text in ("heart", "ember style"))
    masked = graph.add("ConditioningSetMask", conditioning=heart, mask=half, strength=1.0, set_cond_area="default")
    area = graph.add(
        "ConditioningSetAreaPercentage", conditioning=ember, width=1.0, height=0.5, x=0.0, y=0.0, strength=0.7
    )
    for other in (masked, area):
        sampler["positive"] = graph.add("ConditioningCombine", conditioning_1=sampler["positive"], conditioning_2=other)


# ---- to be cancelled


def cancelled(number: int) -> SoakPrompt:
    """Return a prompt with long work: a merge, gate training, calibration, or sampling with a mix."""
    kind = list(_LONG)[number % len(_LONG)]
    graph = Graph()
    return SoakPrompt(kind, graph, _LONG[kind](graph, Random(f"{kind}/{number}")))


def _long_merge(graph: Graph, rng: Random) -> str:
    merged = graph.lego(*(graph.load(f"slow_{i}.safetensors") for i in range(2)), rank="64", starts=60)
    graph.picture(*graph.apply(merged))
    return merged[0]


def _long_training(graph: Graph, rng: Random) -> str:
    pair = _pair(graph, rng)
    gates = graph.train(*pair, steps=2000, seed=rng.randrange(2))
    graph.picture(graph.mix(*pair, gates=gates))
    return gates[0]


def _long_calibration(graph: Graph, rng: Random) -> str:
    pair = _pair(graph, rng)
    merged, statistics = graph.lego(*pair), graph.calibrate(*pair, pictures=400)
    graph.nodes[merged[0]]["inputs"]["statistics"] = statistics
    graph.picture(*graph.apply(merged))
    return statistics[0]


def _long_sampling(graph: Graph, rng: Random) -> str:
    graph.picture(graph.mix(*_pair(graph, rng)))
    graph.nodes["KSampler0"]["inputs"]["steps"] = 1000
    return "KSampler0"


_LONG: dict[str, Callable[[Graph, Random], str]] = {
    "merge": _long_merge, "training": _long_training, "calibration": _long_calibration, "sampling": _long_sampling,
}  # fmt: skip


# ---- to be refused


def refused(number: int) -> SoakPrompt:
    """Return a prompt with a wrong file or setting."""
    graph = Graph()
    kind = list(_WRONG)[number % len(_WRONG)]
    make, words = _WRONG[kind]
    return SoakPrompt(kind, graph, graph.picture(make(graph)), error=words)


_WRONG: dict[str, tuple[Callable[[Graph], Link], str]] = {
    "NaN applied": (lambda g: g.apply(g.load("nan.safetensors"))[0], "NaN or infinite"),
    "NaN mixed": (lambda g: g.mix(g.load("nan.safetensors")), "NaN or infinite"),
    "cut off": (lambda g: g.apply(g.lego(g.load("cut.safetensors")))[0], "The file is cut off"),
    "other model": (lambda g: g.mix(g.load("sd15_kohya.safetensors")), "ComfyUI finds nothing in this LoRA"),
    "switch": (lambda g: g.mix(g.load("flux_kohya.safetensors"), switched_off="2"), "no such LoRA to switch off"),
    "no such file": (lambda g: g.apply(g.load("nowhere.safetensors"))[0], "nowhere.safetensors"),
    "rank": (lambda g: g.apply(g.lego(g.load("flux_kohya.safetensors"), rank="0"))[0], "This is not a rank."),
    "strength": (lambda g: g.mix(g.load("flux_kohya.safetensors", float("nan"))), "not a finite number"),
    "words": (lambda g: g.mix(gates=g.train(g.load("flux_kohya.safetensors"))), "more lines of words than LoRAs"),
}  # fmt: skip
