"""Host frameworks that are not here: the message names what to install, under the project's own name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import kdgraft.hosts
from kdgraft.hosts import COMMANDS, MissingHost, require

PROJECT = (Path(__file__).parents[2] / "pyproject.toml").read_text()


@pytest.mark.parametrize("host", COMMANDS)
def test_what_to_install_for_a_missing_host(host: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kdgraft.hosts, "find_spec", lambda name: None)
    with pytest.raises(MissingHost) as error:
        require(host, "the plugin")
    message = str(error.value)
    assert message.startswith(f"the plugin needs {host}, which is not installed")
    assert "\n" not in message
    # An extra is one of this project's; all else is the host's own stack.
    for package, extra in re.findall(r"([\w.-]+)\[(\w+)\]", message):
        assert package == "kdgraft"
        assert 'name = "kdgraft"' in PROJECT.splitlines()
        assert re.search(rf"^{extra} = \[", PROJECT, re.MULTILINE)
    if host == "transformers":
        assert 'pip install "kdgraft[nlp]"' in message
    else:
        assert f"onedl-{dict(mmseg='mmsegmentation').get(host, 'mmdetection')}==" in message
    assert "taskdistill" not in message
