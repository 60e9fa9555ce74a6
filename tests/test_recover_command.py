"""The command `gradinv recover`, and what `gradinv invert` says of the layers. One or two pictures at 64 px."""

from __future__ import annotations

import dataclasses
import importlib
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from conftest import fails
from torch import Tensor

from gradinv import cli
from gradinv.client import observe
from gradinv.images import to_pixels
from gradinv.models import Model, load_model
from gradinv.network import Segment, parts_of
from gradinv.sources import find, gallery
from gradinv.types import Observation

TINY = ["--model", "resnet18-tiny", "--device", "cpu"]
SHALLOW = ["--boundary", "layer4.0.conv1"]  # three layers take less than a second


@pytest.fixture(scope="module")
def model():
    return load_model("resnet18-tiny", device="cpu")


def pixels_of(model: Model, *names: str) -> Tensor:
    return torch.stack([to_pixels(find(gallery(model), name).open(), model.preprocessing) for name in names])


def observed(model: Model, *names: str) -> Observation:
    labels = [model.class_index(find(gallery(model), name).wnid or "") for name in names]
    return observe(model, pixels_of(model, *names), torch.tensor(labels))


pytestmark = pytest.mark.usefixtures("elsewhere")


def rows(output: str) -> dict[str, list[str]]:
    """From node to the cells behind its name; a cell such as 512 × 2 × 2 is several words."""
    lines = output.splitlines()
    top = next(index for index, line in enumerate(lines) if line.startswith("node "))
    table = [line.split() for line in lines[top:]]
    return {cells[0]: cells[1:] for cells in table[1 : table.index([])]}


def test_one_picture_is_solved_down_to_the_stem(model, capsys):
    assert cli.main(["recover", "goldfish", *TINY]) == 0
    said = capsys.readouterr()
    assert said.err == "" and "goldfish (1 of 1 right)" in said.out and "The final layer is solved but for " in said.out
    found = rows(said.out)
    assert list(found) == list(reversed(parts_of(model.network).nodes[:-1]))
    assert found["maxpool"][:8] == ["64", "×", "16", "×", "16", "exact", "576", "256"]
    for cells in found.values():
        assert cells[-1] == "%" and float(cells[-2]) < 0.01, "the true error"
    lines = said.out.splitlines()
    assert "linear" in lines[-2], "why it ends there"
    assert "down to maxpool (exactly) in " in lines[-1] and " s, 16,384 numbers of each picture." in lines[-1]
    # The table is aligned: each row is as wide as its header, whose last column ends it.
    assert len({len(line) for line in lines if line.startswith(("node ", "layer", "maxpool"))}) == 1


def test_json_and_the_file_hold_what_the_network_sees(model, capsys):
    names = ("goldfish", "tabby")
    assert cli.main(["recover", *names, *TINY, *SHALLOW, "--json", "--out", "deep/layers.safetensors"]) == 0
    said = capsys.readouterr()
    facts: dict[str, Any] = json.loads(said.out)
    assert "layer4.0.conv1" in said.err and "What was solved is in deep/layers.safetensors." in said.err
    nodes = [node["name"] for node in facts["nodes"]]
    assert nodes == ["layer4.1.conv1", "layer4.0", "layer4.0.conv1"]
    assert facts["format"] == 1 and facts["model"] == {"name": model.name, "sha256": model.sha256}
    assert sorted(facts["labels"]["true"]) == sorted(facts["labels"]["restored"])
    assert facts["features_residual"] < 1e-5 and facts["scale"] == pytest.approx(1, abs=1e-4)
    assert facts["stopped"] == "" and facts["seconds"] > sum(node["seconds"] for node in facts["nodes"])
    for node in facts["nodes"]:
        assert node["shape"] == [512, 2, 2] and node["unknowns"] == 8 <= node["equations"]
        assert len(node["error"]) == 2 and max(node["true_error"]) < 1e-4

    with safetensors.safe_open("deep/layers.safetensors", "pt") as file:
        kept = json.loads(file.metadata()["recovered"])
    assert kept["format"] == 1 and kept["model"]["sha256"] == model.sha256
    assert kept["labels"]["restored"] == facts["labels"]["restored"]
    tensors = safetensors.torch.load_file("deep/layers.safetensors")
    assert set(tensors) == {f"{kind}/{node}" for node in nodes for kind in ("activation", "cotangent", "error")}
    with torch.no_grad():
        truth = Segment(model.network, nodes[0], nodes)(model.preprocessing.normalise(pixels_of(model, *names)))
    order = [facts["labels"]["true"].index(label) for label in facts["labels"]["restored"]]
    for node in nodes:
        torch.testing.assert_close(tensors[f"activation/{node}"], truth[node].relu()[order], rtol=1e-3, atol=1e-4)
        assert tensors[f"error/{node}"].shape == (2,)


def test_an_observation_needs_no_pictures_and_has_no_true_error(model, capsys):
    observation = observed(model, "goldfish")
    observation.save("shared.safetensors")
    assert cli.main(["recover", "--observation", "shared.safetensors", *SHALLOW, "--json"]) == 0
    said = capsys.readouterr()
    facts = json.loads(said.out)
    assert "true error" not in said.err and "right" not in said.err
    assert facts["labels"]["true"] is None and not any("true_error" in node for node in facts["nodes"])
    dataclasses.replace(observation, model_sha256="0" * 64).save("other.safetensors")
    assert "other weights of resnet18-tiny" in fails(capsys, "recover", "--observation", "other.safetensors")


def test_a_changed_gradient_stops_the_way_down(capsys):
    assert cli.main(["recover", "goldfish", *TINY, "--defence", "noise:1e-2", "--json"]) == 0
    said = capsys.readouterr()
    facts = json.loads(said.out)
    assert facts["client"]["defences"] == ["noise:1e-2"]
    assert len(facts["nodes"]) < 3 and facts["stopped"]
    assert facts["stopped"] in said.err.splitlines() and "exactly" not in said.err


def test_without_any_layer(capsys):
    assert cli.main(["recover", "goldfish", *TINY, "--mode", "train", "--out", "none.safetensors"]) == 0
    output = capsys.readouterr().out
    assert "In train mode batch normalisation mixes the images" in output and "node " not in output
    assert "No layer below the final one is solved (" in output
    assert safetensors.torch.load_file("none.safetensors") == {}
    assert cli.main(["recover", "goldfish", *TINY, "--boundary", "logits"]) == 0
    assert "The final layer is solved but for " in capsys.readouterr().out


def test_ctrl_c_keeps_the_layers_so_far(monkeypatch, capsys):
    # Not by its name in the package, which is the function's.
    recovery = importlib.import_module("gradinv.recovery.recover")
    solve = recovery.solve_layers

    def interrupted(*args: Any, progress: Any, **options: Any) -> Any:
        def signalled(node: Any) -> None:
            progress(node)
            if node.name == "layer4.0":
                signal.raise_signal(signal.SIGINT)

        return solve(*args, progress=signalled, **options)

    monkeypatch.setattr(recovery, "solve_layers", interrupted)
    assert cli.main(["recover", "goldfish", *TINY, "--out", "some.safetensors", "--json"]) == 130
    said = capsys.readouterr()
    assert [node["name"] for node in json.loads(said.out)["nodes"]] == ["layer4.1.conv1", "layer4.0"]
    assert "activation/layer4.0" in safetensors.torch.load_file("some.safetensors")
    assert "Stopped; " in said.err.splitlines()[-1] and "kept in some.safetensors" in said.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ([], "Which pictures? Name some (gradinv recover goldfish lion)"),
        (["lion", "--boundary", "conv9"], "boundary takes loss, logits, auto, or a node's name"),
        (["lion", "--boundary", "layer4.7"], "The network has no node 'layer4.7'"),
        (["lion", "--labels", "guess"], "labels takes one of auto, column-minimum"),
        (["lion", "--seed", "-1"], "seed must be a finite number of at least 0"),
        (["lion", "--out", "file/layers"], "file is a file; name another with --out."),
        (["lion", "--out", "."], ". is a folder; name another with --out."),
        (["lion", "--observation", "missing"], "leave the picture lion or --observation out"),
    ],
)
def test_bad_use_is_one_sentence_before_any_work(args, sentence, tmp_path, capsys):
    Path("file").write_text("not a folder")
    assert sentence in fails(capsys, "recover", *TINY, *args)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_node_that_the_gradient_does_not_determine(capsys):
    args = ["goldfish", *TINY, "--defence", "noise:1e-2", "--boundary", "layer4.0"]
    assert "The gradient does not determine layer4.0: " in fails(capsys, "recover", *args)


def test_invert_says_how_deep_it_is_solved_and_keeps_the_table(capsys):
    settings = ["--seeds", "1", "--iterations", "1", "--out", "run", "--boundary", "layer4.0.conv1"]
    assert cli.main(["invert", "goldfish", *TINY, *settings]) == 0
    output = capsys.readouterr().out
    assert "Layers solved from the gradient down to layer4.0.conv1 (exactly), " in output
    table = json.loads(Path("run", "run.json").read_text())["recovered"]
    assert [node["name"] for node in table["nodes"]] == ["layer4.1.conv1", "layer4.0", "layer4.0.conv1"]
    assert set(table) == {"features_residual", "scale", "nodes", "stopped", "notes", "seconds"}
