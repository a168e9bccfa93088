"""The command line on detection configs: what works exits 0, a user's mistake is one line and exit code 2."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

import kdgraft_det
from kdgraft.cli import main
from kdgraft.listing import written
from support.commands import refused
from support.det import (
    CLASSES,
    EVERY_TERM,
    TERM_NAMES,
    build,
    detector,
    distilled,
    runner_config,
    save_plain,
    save_teacher,
)
from support.det_zoo import zoo
from support.forking import python
from support.mm import needs_resume

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path, scenes, teacher_model, teacher_checkpoint):
    """A config file; its entries can be changed before it is written."""

    def write(change=lambda model: None, **settings):
        model = distilled(detector(), teacher_model, teacher_checkpoint, **EVERY_TERM)
        change(model)
        path = tmp_path / "distilled.py"
        runner_config(model, scenes, tmp_path / "work", iters=2, **settings).dump(path)
        return str(path)

    return write


def test_check_prints_the_wiring_and_leaves_nothing_behind(config, capsys, tmp_path):
    path = config()
    assert main(["check", path]) == 0
    said = capsys.readouterr().out
    assert "DistilledGFL: wiring" in said
    for name in TERM_NAMES:
        assert name in said and f"distill.{name}.loss" in said
    for cell in ("neck[*]", "ConvAdapter 8→12", "1×8×16×16", "1×12×16×16", "foreground", "vlr", "0.125"):
        assert cell in said, cell
    assert not (tmp_path / "work").exists()


def test_check_tells_the_shares_of_the_gradient(config, capsys):
    features = dict(type="FeatureImitation", tap="neck[*]")
    weak = dict(features, weight=1e-6, name="weak", schedule=dict(type="WarmUp", end=9))
    auto = dict(features, weight=dict(type="auto", share=0.5, batches=2), name="fitting")
    path = config(lambda model: model.update(recipe=None, terms=[weak, auto]))
    assert main(["check", path]) == 0
    said = capsys.readouterr().out
    assert "gradient of each term over that of the host's own loss, mean of 4 batches" in said
    assert "auto (share 0.5)" in said and "(auto)" in said
    (remark,) = [line for line in said.splitlines() if line.startswith("weak: the norm of its gradient is ")]
    assert remark.endswith("it hardly teaches; change its weight, or set weight='auto'")


@pytest.mark.parametrize("kind", ["TOOD", "YOLOX"])
def test_check_runs_what_reads_the_iteration_from_the_training_loop(tmp_path, scenes, capsys, kind):
    teacher, student = zoo(kind), zoo(kind)
    if kind == "YOLOX":  # of the stock configs
        resize = dict(type="BatchSyncRandomResize", random_size_range=(64, 96), size_divisor=32, interval=1)
        student["data_preprocessor"]["batch_augments"] = [resize]
    model = distilled(
        student, teacher, save_teacher(tmp_path / "teacher.pth", teacher), terms=[dict(type="SoftTargets")]
    )
    path = tmp_path / "distilled.py"
    runner_config(model, scenes, tmp_path / "work").dump(path)
    assert main(["check", str(path)]) == 0
    assert "distill.soft_targets.loss" in capsys.readouterr().out


def test_train_and_export(config, capsys, tmp_path):
    path, work = config(), tmp_path / "elsewhere"
    assert main(["train", path, "--work-dir", str(work), "--seed", "5", "--cfg-options", "train_cfg.max_iters=2"]) == 0
    assert main(["export", str(work / "iter_2.pth"), str(tmp_path / "out" / "student.pth")]) == 0
    build(detector()).load_state_dict(torch.load(tmp_path / "out" / "student.pth", weights_only=True)["state_dict"])
    assert Config.fromfile(tmp_path / "out" / "student.py").randomness.seed == 5


@needs_resume
@pytest.mark.parametrize("resume", [["--resume"], ["--resume", "work/iter_2.pth"]])
def test_train_goes_on_where_it_stopped(config, tmp_path, monkeypatch, resume):
    monkeypatch.chdir(tmp_path)
    assert main(["train", config()]) == 0
    assert main(["train", config(), *resume, "--cfg-options", "train_cfg.max_iters=4"]) == 0
    last = torch.load("work/iter_4.pth", weights_only=False)
    assert len(last["message_hub"]["log_scalars"]["train/loss"].data[0]) == 4


@needs_resume
def test_resuming_with_other_terms_is_one_line(config, capsys, tmp_path):
    work = str(tmp_path / "run")
    assert main(["train", config(), "--work-dir", work]) == 0
    other = config(lambda m: m.update(recipe=None, terms=[dict(type="FeatureImitation", tap="neck[0]")]))
    refused(capsys, ["train", other, "--work-dir", work, "--resume"], "made with other distillation terms")


@needs_resume
def test_a_plain_checkpoint_is_no_run_to_resume(config, capsys, tmp_path, scenes):
    plain = tmp_path / "plain.py"
    runner_config(detector(), scenes, tmp_path / "run", iters=1).dump(plain)
    assert main(["train", str(plain)]) == 0
    arguments = ["train", config(), "--resume", str(tmp_path / "run" / "iter_1.pth")]
    refused(capsys, arguments, "made without these distillation terms", "as load_from")


def test_warnings_stand_in_the_log_of_the_run(config, tmp_path, teacher_model):
    unnamed = save_plain(tmp_path / "unnamed.pth", build(teacher_model), None)
    work = tmp_path / "run"
    assert main(["train", config(lambda m: m["teacher"].update(checkpoint=unnamed)), "--work-dir", str(work)]) == 0
    (log,) = work.glob("*/*.log")
    warning = next(line for line in log.read_text().splitlines() if "does not name its classes" in line)
    assert "WARNING" in warning


@pytest.mark.parametrize("command", ["check", "train"])
@pytest.mark.parametrize(
    ("option", "parts"),
    [
        ("optim_wrapper.optimizer.type=AdmW", ("distilled.py: TypeError",)),
        ("optim_wrapper.optimizer.lrr=0.1", ("lrr",)),
        ("model.bbox_head.norm_cfg.num_groups=7", ("num_channels", "num_groups")),
        ("val_evaluator.ann_file=absent.json", ("absent.json",)),
        ("model.dry_run_size=-4", ("dry_run_size must be a whole number >= 1, got -4",)),
        (
            "model.neck.in_channels=[8,16,32,16]",
            ("dry run of the student", "see that its parts fit together (in_channels)"),
        ),
        (
            "train_dataloader.dataset.metainfo.classes=['zebra'] train_dataloader.dataset.filter_cfg.filter_empty_gt=True",
            ("no image of the training set", "metainfo.classes"),
        ),
    ],
)
def test_what_the_host_refuses_is_one_line_before_training(config, capsys, command, option, parts):
    refused(capsys, [command, config(), "--cfg-options", *option.split()], *parts)


def test_a_plugin_that_is_not_imported(config, capsys, monkeypatch):
    path = config()
    written = Config.fromfile(path)
    written.pop("custom_imports", None)
    written.dump(path)
    monkeypatch.delitem(sys.modules, "kdgraft_det")
    refused(capsys, ["check", path], "add custom_imports = dict(imports=['kdgraft_det'])")


def test_list_names_terms_and_recipes(capsys):
    assert main(["list"]) == 0
    said = capsys.readouterr().out
    for name in ("LocalizationDistillation", "SoftTargets", "FeatureImitation", "foreground", "WarmUp", "ld"):
        assert name in said
    assert main(["list", "ld"]) == 0
    printed = capsys.readouterr().out
    namespace: dict = {}
    exec(printed, namespace)  # it is meant to be pasted into a config
    assert [term["name"] for term in namespace["terms"]] == ["ld_main", "ld_vlr", "class_main"]
    refused(capsys, ["list", "imitations"], "'imitation'")


@pytest.mark.parametrize("command", ["check", "train"])
@pytest.mark.parametrize(
    ("change", "parts"),
    [
        pytest.param(
            lambda m: m["terms"].append(dict(type="FeatureImitation", tap="backbone.layer9")),
            ("no module 'backbone.layer9'", "did you mean"),
            id="tap",
        ),
        pytest.param(
            lambda m: m["terms"].append(dict(type="SoftTargets", wieght=1)), ("'wieght'", "'weight'"), id="typo"
        ),
        pytest.param(
            lambda m: m["terms"].append(dict(type="SoftTargets", weight=-1)), ("weight must be",), id="weight"
        ),
        pytest.param(
            lambda m: m["teacher"].update(checkpoint="absent.pth"), ("checkpoint not found: absent.pth",), id="file"
        ),
        pytest.param(lambda m: m["teacher"].update(config="absent.py"), ("config not found: absent.py",), id="config"),
        pytest.param(
            lambda m: m["teacher"].update(config=detector(width=8)), ("does not fit the teacher GFL",), id="weights"
        ),
        pytest.param(lambda m: m["teacher"].update(config=detector("ATSS")), ("teacher's ATSSHead",), id="head"),
        pytest.param(lambda m: m.update(recipe="imitations"), ("'imitation'",), id="recipe"),
    ],
)
def test_a_mistake_in_the_config(config, capsys, command, change, parts):
    refused(capsys, [command, config(change)], *parts)


@pytest.mark.parametrize("command", ["check", "train"])
def test_other_classes(config, capsys, command, tmp_path, teacher_model):
    other = save_plain(tmp_path / "other.pth", build(teacher_model), (*CLASSES[:9], "zebra"))
    refused(capsys, [command, config(lambda m: m["teacher"].update(checkpoint=other))], "other classes", "zebra")


def test_mistakes_on_the_command_line(config, capsys, tmp_path):
    path = config()
    refused(capsys, ["check", "absent.py"], "config not found: absent.py")
    refused(capsys, ["train", "absent.py"], "config not found: absent.py")
    refused(capsys, ["check", path, "--cfg-options", "train_cfg.max_iters"], "--cfg-options takes KEY=VALUE")
    refused(capsys, ["export", "absent.pth", str(tmp_path / "out.pth")], "checkpoint not found: absent.pth")
    if not torch.cuda.is_available():
        refused(capsys, ["train", path, "--amp"], "--amp needs a GPU")
    with pytest.raises(SystemExit) as caught:
        main(["trian", path])
    assert caught.value.code == 2


def test_checking_a_plain_config_says_what_to_set(config, capsys, tmp_path, scenes):
    path = tmp_path / "plain.py"
    runner_config(detector(), scenes, tmp_path / "work").dump(path)
    refused(capsys, ["check", str(path)], "trains a plain GFL; set model.type='DistilledDetector'")


@pytest.mark.slow
def test_a_mistake_in_a_process_of_its_own_prints_one_line_and_no_traceback(config, tmp_path):
    path = config(lambda m: m["teacher"].update(chekpoint="t.pth"))
    done = python("-W", "ignore", "-m", "kdgraft", "check", path, host="mmdet", folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "kdgraft: error: teacher takes no argument 'chekpoint'; did you mean 'checkpoint'?\n"
    assert "Traceback" not in done.stdout


def test_names_and_files_are_told_at_once_and_before_the_host_is_imported(config, tmp_path):
    def change(model):
        model["recipe"] = "xyz"
        model["terms"] = ["SoftTarget", dict(type="FeatureImitation", tap="neck[")]
        model["teacher"]["checkpoint"] = "absent.pth"

    path = config(change)
    program = (
        "import sys\nfrom kdgraft.cli import main\ncode = main(['check', sys.argv[1]])\n"
        "sys.exit(100 if {'mmcv', 'mmdet', 'kdgraft_det'} & set(sys.modules) else code)"
    )
    done = python("-W", "ignore", "-c", program, path, folder=tmp_path)
    assert done.returncode == 2, done.stderr
    # bitsandbytes, where something imports it, says on a CPU what it lacks.
    (line,) = [one for one in done.stderr.splitlines() if "gemm_4bit" not in one]
    assert line.startswith("kdgraft: error: 4 mistakes: (1) no term is called 'SoftTarget'; did you mean 'SoftTargets'")
    assert "(2) cannot read tap 'neck['" in line
    assert "(3) no recipe is called 'xyz'" in line
    assert line.endswith("(4) checkpoint not found: absent.pth")


def test_arguments_of_terms_are_told_at_once(config, capsys):
    def change(model):
        model["terms"] = [dict(type="SoftTargets", wieght=1), dict(type="FocalGlobal", loss="hint")]

    refused(
        capsys,
        ["check", config(change)],
        "2 mistakes: (1) term SoftTargets takes no argument 'wieght'",
        "(2) term FocalGlobal takes no argument 'loss'",
    )


def test_names_are_read_from_the_source_as_the_plugin_registers_them():
    for kind, registry in (("TERMS", kdgraft_det.TERMS), ("RECIPES", kdgraft_det.RECIPES)):
        own = {n for n, made in registry._own.items() if made.__module__.startswith("kdgraft_det")}
        assert set(written("kdgraft_det", kind)) == own


@pytest.mark.parametrize("which", ["train", "val"])
def test_the_wiring_is_printed_without_the_data_set(config, capsys, which):
    absent = f"{which}_dataloader.dataset.ann_file=absent.json"
    capsys.readouterr()
    assert main(["check", config(), "--cfg-options", absent]) == 2
    said = capsys.readouterr()
    assert "DistilledGFL: wiring" in said.out
    for name in TERM_NAMES:
        assert name in said.out
    assert "one step" not in said.out
    (line,) = said.err.splitlines()
    assert line.startswith("kdgraft: error: the wiring above holds; the first step was not run")
    assert f"{which}_dataloader: " in line and line.endswith("absent.json")


def test_check_runs_terms_that_warm_up_from_nothing(config, capsys):
    def warm(model):
        model["recipe"] = None
        model["terms"] = [dict(type="SoftTargets", schedule=dict(type="WarmUp", end=500))]

    assert main(["check", config(warm)]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("distill.soft_targets.loss"))
    assert float(row.split()[-1]) > 0


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("model = dict(", "SyntaxError"),
        ("a = 1", "has no 'model'"),
        ("model = dict(type='DistilledDetector', student='GLF', teacher=1, terms=['SoftTargets'])", "GLF"),
    ],
)
def test_broken_configs_are_one_line(tmp_path, capsys, text, part):
    path = tmp_path / "broken.py"
    path.write_text(text + "\ncustom_imports = dict(imports=['kdgraft_det'])\ntrain_dataloader = None\n")
    refused(capsys, ["check", str(path)], part)


def test_a_config_that_is_no_python_is_one_line(tmp_path, capsys):
    path = tmp_path / "config.txt"
    path.write_text("model")
    refused(capsys, ["check", str(path)], "config.txt")


def test_a_schedule_by_epoch_in_a_run_without_epochs_is_refused(config, capsys):
    def by_epoch(model):
        model["recipe"] = None
        model["terms"] = [dict(type="SoftTargets", schedule=dict(type="WarmUp", end=2, by="epoch"))]

    refused(capsys, ["train", config(by_epoch)], "by='epoch' never moves")


def test_export_does_not_overwrite_what_it_reads(tmp_path, capsys):
    for out in ("student.py", "."):
        refused(capsys, ["export", str(tmp_path / "a.pth"), str(tmp_path / out)], "name a new file")


@needs_resume
def test_terms_that_a_checkpoint_knows_nothing_of_start_anew_for_those_who_say_so_alone(config, capsys, tmp_path):
    path, first = config(), tmp_path / "work" / "iter_2.pth"
    assert main(["train", path]) == 0
    saved = torch.load(first, weights_only=False)
    del saved["message_hub"]["runtime_info"]["kdgraft"], saved["message_hub"]["resumed_keys"]["kdgraft"]
    torch.save(saved, first)
    arguments = ["train", path, "--resume", str(first), "--cfg-options", "train_cfg.max_iters=3"]
    refused(capsys, arguments, "made without these distillation terms", "layer3", "--partial")
    assert not (tmp_path / "work" / "iter_3.pth").exists()
    assert main([*arguments, "--partial"]) == 0
    assert (tmp_path / "work" / "iter_3.pth").exists()


@pytest.mark.parametrize("kind", ["mmdet.DistilledDetector", "kdgraft_det.detector.DistilledDetector", "the class"])
def test_a_model_named_by_scope_path_or_class_is_checked_trained_and_exported_as_one_named_short(
    config, tmp_path, kind
):
    path = config(lambda model: model.update(type=kind))
    if kind == "the class":  # a pure-Python config
        written = Config.fromfile(path)
        written.pop("custom_imports")
        text = written.pretty_text.replace("type='the class'", "type=DistilledDetector")
        Path(path).write_text(f"from kdgraft_det import DistilledDetector\n{text}")
    assert main(["check", path]) == 0
    assert main(["train", path]) == 0
    out = tmp_path / "out" / "student.pth"
    assert main(["export", str(tmp_path / "work" / "iter_2.pth"), str(out)]) == 0
    plain = Config.fromfile(out.with_suffix(".py"))
    assert plain.model.type == "GFL" and "kdgraft" not in out.with_suffix(".py").read_text()
    build(plain.model.to_dict()).load_state_dict(torch.load(out, weights_only=True)["state_dict"])
