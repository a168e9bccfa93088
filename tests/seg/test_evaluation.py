"""``kdgraft test`` on segmentors: the host's own figures, from a config whose base is named ``mmseg::…`` too."""

from __future__ import annotations

import pytest

from kdgraft.cli import main
from support import seg as models


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, float]:
    capsys.readouterr()
    assert main(["test", *arguments]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]  # among them the host's own
    return {row[0]: float(row[1]) for row in rows if len(row) == 2}


def test_the_figures_are_those_of_the_hosts_own_test(scenes, teacher, distilled_run, tmp_path, capsys):
    plain, distilled = tmp_path / "plain.py", tmp_path / "distilled.py"
    models.config(models.segmentor(), scenes, tmp_path / "work").dump(plain)
    model = models.distilled(models.segmentor(), teacher, **models.EVERY_TERM)
    imports = dict(imports=["kdgraft_seg"])
    models.config(model, scenes, tmp_path / "work", custom_imports=imports).dump(distilled)
    expected = {name: round(float(value), 4) for name, value in distilled_run.runner.test().items()}
    first = {**expected, **printed(capsys, str(plain), str(distilled_run.checkpoint(2)))}
    assert expected["mIoU"] > 0 and first != expected  # another checkpoint has other figures
    for config in (plain, distilled):
        assert printed(capsys, str(config), str(distilled_run.checkpoint(4))) == expected


def test_a_base_of_the_host_is_found(scenes, tmp_path, capsys):
    """The fork's own tools/test.py does not find it under the name of its distribution."""
    config = tmp_path / "config.py"
    sets = models.config(models.segmentor(), scenes, tmp_path / "work")
    told = {name: sets[name].to_dict() for name in ("test_dataloader", "test_evaluator")}
    lines = ["_base_ = 'mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py'", "custom_imports = None"]
    lines += [f"{name} = dict(_delete_=True, **{value})" for name, value in told.items()]
    config.write_text("\n".join(lines))
    assert main(["test", str(config), str(tmp_path / "none.pth")]) == 2
    assert "checkpoint not found" in capsys.readouterr().err  # the config and its base were read
