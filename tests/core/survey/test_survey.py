"""Surveys of adapters with known deltas: values by hand."""

from __future__ import annotations

import pytest
import torch
from legomole.core.adapter import Adapter, Source
from legomole.core.lowrank import LowRank
from legomole.core.merge.engine import merge
from legomole.core.merge.methods.svd import SVD
from legomole.core.merge.rank import Rank
from legomole.core.survey.embedding import pca
from legomole.core.survey.survey import survey

WIDTH = 6


def part(*units: tuple[float, int, int]) -> LowRank:
    """``sum_j size_j e_out e_in^T``, with factors in which the units are mixed."""
    r = len(units)
    A, B = torch.zeros(r, WIDTH), torch.zeros(WIDTH, r)
    for j, (size, out, into) in enumerate(units):
        A[j, into], B[out, j] = 1.0, size
    R = torch.eye(r) + torch.ones(r, r).triu(1)  # an invertible matrix does not change B A
    return LowRank(R @ A, B @ torch.linalg.inv(R))


def adapter(name: str, modules: dict[str, LowRank]) -> Adapter:
    return Adapter(modules, source=Source(f"{name}.safetensors", "", "comfy"))


def layers(*parts_: LowRank) -> dict[str, LowRank]:
    """Blocks 0, 1, .. with two layers each: the given one and a zero one."""
    return {f"blocks.{i}.a.q": part for i, part in enumerate(parts_)} | {
        f"blocks.{i}.b.q": LowRank(torch.zeros(1, WIDTH), torch.zeros(WIDTH, 1)) for i in range(len(parts_))
    }


# block 0: the same unit at 3 and 4; block 1: opposite units 2 and -2; block 2: nothing in common, 1 and (5, 2)
A = adapter("a", layers(part((3, 0, 0)), part((2, 1, 1)), part((1, 0, 0))))
B = adapter("b", layers(part((4, 0, 0)), part((-2, 1, 1)), part((5, 2, 2), (2, 3, 0))))


def close(found, wanted) -> None:
    torch.testing.assert_close(torch.as_tensor(found).double(), torch.as_tensor(wanted).double(), rtol=0, atol=1e-5)


def test_energies_are_squared_norms_by_block_and_lora():
    found = survey([A, B])
    assert [block.name for block in found.blocks] == ["blocks.0", "blocks.1", "blocks.2"]
    close(found.energies(), [[9, 16], [4, 4], [1, 29]])
    close(survey([A, B], [2, -1]).energies(), [[36, 16], [16, 4], [4, 29]])


def test_overlap_by_block():
    found = survey([A, B])
    assert [found.report_of(part.layers).overlap()[0][1] for part in found.blocks] == pytest.approx(
        [1, -1, 0], abs=1e-5
    )


def test_spectra_are_those_of_the_deltas():
    """Sums: 7; 0; 1, 5 and 2 in rows and columns (0,0), (2,2), (3,0): the singular values of [[1], [2]] are sqrt 5."""
    found = survey([A, B])
    layer = found.layers["blocks.2.a.q"]
    close(layer.of_sum, [5, 5**0.5, 0])
    close(layer.of_adapters[0], [1])
    close(layer.of_adapters[1], [5, 2])
    assert float(found.layers["blocks.0.a.q"].of_sum[0]) == pytest.approx(7, abs=1e-5)
    assert float(found.layers["blocks.1.a.q"].of_sum.max()) < 1e-5


def test_energy_kept_by_rank():
    """The sum's squares are 49, 0 and 25 + 5: rank 1 keeps 74 of 79. b's: 16 + 4 + 25 of 49. Blocks 2: 25 of 30."""
    found = survey([A, B])
    close(found.energy_by_rank()[:2], [74 / 79, 1])
    close(found.energy_by_rank(1), [45 / 49, 1])
    close(found.energy_by_rank(0), [1])
    close(found.energy_by_rank(None, found.blocks[2].layers)[:2], [25 / 30, 1])
    assert [found.rank_for(share) for share in (0.9, 0.95, 1.0)] == [1, 2, 2]
    # root mean square over six layers, three of them zero
    close(found.spectrum()[:2], [(74 / 6) ** 0.5, (5 / 6) ** 0.5])
    close(found.spectrum(0), [(14 / 6) ** 0.5])


def test_energy_by_rank_is_what_svd_keeps():
    adapters = [adapter(name, {"x.0.q": part((3, i, 0), (2, 1, 1), (1, 2, i))}) for i, name in enumerate("ab")]
    found = survey(adapters)
    for k in (1, 2, 3):
        kept = merge(adapters, SVD(Rank(k))).report.energy_kept
        assert float(found.energy_by_rank()[k - 1]) == pytest.approx(kept, abs=1e-6)


def test_lego_energy_is_relative_to_the_sum():
    """At rank 1 block 0 loses none of its energy of 49, block 1 has none, block 2 loses some of its 30."""
    found = survey([A, B], rank=Rank(1))
    modules = {module.name: module for module in found.report.modules}
    lost = modules["blocks.2.a.q"].error ** 2 * 30
    assert found.lego_energy() == pytest.approx(1 - lost / 79, abs=1e-4)
    assert found.lego_energy() <= float(found.energy_by_rank()[0]) + 1e-6
    assert survey([A, B], rank=Rank(3)).lego_energy() == pytest.approx(1, abs=1e-5)


def test_shared_directions_do_not_depend_on_size():
    """Blocks 0 and 1 share all. In block 2 both read e0, but only a writes it. Zero layers do not count."""
    found = survey([A, B])
    block = found.layers["blocks.2.a.q"]
    close(block.shared_in, [[1, 1], [1, 1]])
    close(block.shared_out, [[1, 0], [0, 1]])
    shared_in, shared_out = found.shared_directions()
    assert float(shared_in[0, 1]) == pytest.approx(3 / 3, abs=1e-5)
    assert float(shared_out[0, 1]) == pytest.approx(2 / 3, abs=1e-5)


def test_origins_count_merged_units():
    """At rank 1 all units come from both. At rank 2, in block 2, a's unit of size 1 and b's of size 2 become one.

    The zero layers count too: there both have a unit.
    """
    pure, mixed = survey([A, B], rank=Rank(1)).unit_origins()
    close(pure[0], [0, 0])
    close(mixed[0], [0.5 + 0.5, 0.5 + 0.5])
    close(mixed[2], [1 / 3 + 0.5, 2 / 3 + 0.5])
    pure, mixed = survey([A, B], rank=Rank(2)).unit_origins()
    close(pure[2], [0 + 1, 1 + 1])
    close(mixed[2], [0.5, 0.5])


def test_maps_show_the_largest_layer_of_each_section():
    found = survey([A, B])
    assert [(m.layer, m.section) for m in found.unit_maps] == [
        ("blocks.0.a.q", "the first blocks"),
        ("blocks.1.a.q", "the middle blocks"),
        ("blocks.2.a.q", "the last blocks"),
    ]
    first, middle, last = found.unit_maps
    close(first.sizes, [3, 4])
    close((first.points[0] - first.points[1]).norm(), 1)  # 3 and 4 times the same matrix
    close((middle.points[0] - middle.points[1]).norm(), 4)
    assert last.owner.tolist() == [0, 1, 1]
    close(last.sizes, [1, 5, 2])


def test_a_layer_that_only_one_lora_changes():
    other = adapter("c", {"blocks.0.a.q": A.modules["blocks.0.a.q"]})
    found = survey([B, other])
    close(found.energies(), [[16, 9], [4, 0], [29, 0]])
    close(found.energy_by_rank(1), [1])
    close(survey([other]).energy_by_rank(), [1])


def test_the_result_does_not_depend_on_the_gauge():
    g = torch.Generator().manual_seed(0)
    random = {f"m.{i}.q": LowRank(torch.randn(3, WIDTH, generator=g), torch.randn(5, 3, generator=g)) for i in range(3)}
    R = torch.randn(3, 3, generator=g)
    transformed = {name: LowRank(R @ p.A, p.B @ torch.linalg.inv(R)) for name, p in random.items()}
    one, two = (survey([adapter("x", modules)]) for modules in (random, transformed))
    for m, n in zip(one.unit_maps, two.unit_maps, strict=True):
        torch.testing.assert_close(m.points, n.points, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(one.energy_by_rank(), two.energy_by_rank(), rtol=1e-4, atol=1e-5)


def test_pca_of_known_points():
    points = torch.tensor([[0.0, 3.0], [0.0, -3.0], [1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    close(pca(points @ points.T).abs(), points.flip(1).abs())
    assert pca(torch.ones(1, 1)).tolist() == [[0, 0]]
    assert pca(torch.ones(0, 0)).shape == (0, 2)


def test_among_equal_layers_the_first_by_name_is_drawn():
    """Whichever batch a thread finishes first."""
    torch.manual_seed(0)
    A, B = torch.randn(2, 6), torch.randn(5, 2)
    names = [f"transformer.transformer_blocks.{i}.attn.to_{x}" for i in (1, 0) for x in "vkq"]
    one, other = ({name: LowRank(A * s, B) for name in names} for s in (1.0, 2.0))
    found = survey([Adapter(one, source=Source("a")), Adapter(other, source=Source("b"))])
    assert [drawn.layer for drawn in found.unit_maps] == ["transformer.transformer_blocks.0.attn.to_k"]
