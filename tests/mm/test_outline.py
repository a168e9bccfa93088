"""What is said of a distilled config before anything is imported: all mistakes in names, taps and files at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config

from kdgraft import DistillError
from kdgraft.readers import Reader
from kdgraft.registry import RECIPES, TERMS, Registry
from kdgraft_mm.outline import check_outline, check_terms, missing_data, refuse
from kdgraft_mm.run import read_config


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A distilled model whose files are there, seen before its plugin is imported."""
    monkeypatch.delitem(sys.modules, "kdgraft_det", raising=False)
    (tmp_path / "teacher.py").write_text("model = dict(type='GFL')")
    (tmp_path / "teacher.pth").touch()
    return dict(
        type="DistilledDetector",
        student="GFL",
        teacher=dict(config=str(tmp_path / "teacher.py"), checkpoint=str(tmp_path / "teacher.pth")),
        terms=["SoftTargets", dict(type="FeatureImitation", tap=["neck[0]", "backbone.layer3:input"])],
    )


def said(model: dict[str, Any], **rest: Any) -> str:
    config = Config(dict(model=model, custom_imports=dict(imports=["kdgraft_det"]), **rest))
    with pytest.raises(DistillError) as error:
        check_outline(config, "kdgraft_det")
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_sound_config_passes(model: dict[str, Any]):
    for terms in (model["terms"], None, [dict(type="CrossHead"), dict(type="FocalGlobal")], 5):
        check_outline(Config(dict(model={**model, "terms": terms}, load_from="https://host/x.pth")), "kdgraft_det")
    assert "kdgraft_det" not in sys.modules


def test_all_mistakes_are_told_at_once(model: dict[str, Any]):
    model["recipe"] = "imitations"
    model["terms"] = ["SoftTarget", dict(type="FeatureImitation", tap="neck[*", student_tap=["neck", "a b"])]
    model["teacher"] = dict(config="absent.py", checkpoint="absent.pth")
    message = said(model, load_from="gone.pth")
    parts = (
        "7 mistakes: (1) no term is called 'SoftTarget'; did you mean 'SoftTargets'?; ",
        "(2) cannot read tap 'neck[*'; write it like 'neck[*]', 'backbone.layer3:input' or 'head.m()'; ",
        "(3) cannot read tap 'a b'; write it like ",
        "(4) no recipe is called 'imitations'; ",
        "(5) config not found: absent.py; (6) checkpoint not found: absent.pth; (7) load_from not found: gone.pth",
    )
    places = [message.index(part) for part in parts]
    assert places == sorted(places)
    assert places[0] == 0 and message.endswith(parts[-1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(recipe=dict(type="xyz", weight=1)), "no recipe is called 'xyz'; known: "),
        (dict(terms=[dict(type="SoftTarget")]), "no term is called 'SoftTarget'; did you mean 'SoftTargets'?"),
        (dict(teacher=dict(config=dict(type="GFL"), checkpoint="absent.pth")), "checkpoint not found: absent.pth"),
    ],
)
def test_one_mistake_is_not_numbered(model: dict[str, Any], change: dict[str, Any], message: str):
    assert said({**model, **change}).startswith(message)


def test_names_of_modules_that_are_not_imported_yet_are_left_alone(model: dict[str, Any]):
    model["terms"] = ["NobodysTerm"]
    config = Config(dict(model=model, custom_imports=dict(imports=["kdgraft_det", "their_terms"])))
    check_outline(config, "kdgraft_det")
    assert said(model).startswith("no term is called 'NobodysTerm'")  # with nothing else to import, nobody registers it


def test_names_that_a_test_or_a_notebook_registered_count(model: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    class Plugin:
        TERMS = Registry("term", "kdgraft.no_such_group", TERMS)
        RECIPES = RECIPES

    Plugin.TERMS.register("Mine")(TERMS.get("FeatureImitation"))
    monkeypatch.setitem(sys.modules, "kdgraft_det", Plugin)
    check_outline(Config(dict(model={**model, "terms": ["Mine"]})), "kdgraft_det")
    assert said({**model, "terms": ["Mime"]}) == "no term is called 'Mime'; did you mean 'Mine'?"


def test_arguments_of_all_terms_are_told_at_once():
    terms = [
        dict(type="FeatureImitation", tap="a", wieght=1),
        dict(type="Hint", tap="a"),
        dict(type="SoftTargets", temperature=0, schedule="WarmUp"),
    ]
    with pytest.raises(DistillError) as error:
        check_terms(dict(terms=terms, recipe="nothing"), TERMS, RECIPES, Reader)
    assert str(error.value).startswith("3 mistakes: (1) no recipe is called 'nothing'")
    assert "(2) term FeatureImitation takes no argument 'wieght'; did you mean 'weight'?" in str(error.value)
    assert "(3) schedule WarmUp: missing a required argument: 'end'" in str(error.value)
    check_terms(dict(terms=[dict(type="Hint", tap="a")]), TERMS, RECIPES, Reader)
    check_terms(dict(terms=None), TERMS, RECIPES, Reader)


def test_nothing_is_refused_where_nothing_is_wrong():
    refuse([])
    with pytest.raises(DistillError, match=r"^a$"):
        refuse(["a"])


def test_missing_data(tmp_path: Path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train.json").touch()
    inner = dict(
        type="CocoDataset", data_root=str(tmp_path), ann_file="train.json", data_prefix=dict(img="train/", seg="masks/")
    )
    config = Config(
        dict(
            train_dataloader=dict(batch_size=2, dataset=dict(type="RepeatDataset", times=2, dataset=inner)),
            val_dataloader=dict(
                dataset=dict(
                    type="ConcatDataset",
                    datasets=[
                        dict(inner, ann_file="val.json", data_prefix=dict()),
                        dict(inner, ann_file="/val.json", backend_args=dict(backend="petrel")),
                        dict(inner, ann_file="s3://bucket/val.json", data_prefix=None),
                    ],
                )
            ),
            test_dataloader=dict(dataset=dict(ann_file="untouched.json")),
        )
    )
    assert missing_data(config) == [
        f"train_dataloader: {tmp_path}/masks",
        f"val_dataloader: {tmp_path}/val.json",
    ]
    assert missing_data(Config(dict(train_dataloader=None))) == []


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("data=[unclosed", "--cfg-options 'data=[unclosed': a bracket is not closed"),
        ("data=[a,(b,c]", "--cfg-options 'data=[a,(b,c]': a bracket is not closed"),
        ("data=a,b]", "--cfg-options 'data=a,b]': the brackets do not match"),
        ("data=),(", "--cfg-options 'data=),(': the brackets do not match"),
        ("=5", "--cfg-options takes KEY=VALUE, got '=5'"),
        ("data", "--cfg-options takes KEY=VALUE, got 'data'"),
        ("model=5", "has no 'model'"),
        ("terms.0.weight=5", "config "),
        ("custom_imports=5", "config "),
    ],
)
def test_options_that_cannot_be_read(tmp_path: Path, option: str, message: str):
    path = tmp_path / "config.py"
    path.write_text("model = dict(type='Plain')\nterms = []\n")
    with pytest.raises(DistillError) as error:
        read_config(str(path), [option])
    assert message in str(error.value)


def test_options_change_the_config(tmp_path: Path):
    path = tmp_path / "config.py"
    path.write_text("model = dict(type='Plain', width=1)\n")
    config = read_config(str(path), ["model.width=[1,(2,3)]", "note=a[b", "x='[1,2]'"])
    assert config.model.width == [1, (2, 3)]
    assert (config.note, config.x) == ("a[b", [1, 2])
