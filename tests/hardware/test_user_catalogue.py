"""A user's own file of cards: what it adds and overrides, and the one line that each of its mistakes gets."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scalegpt.errors import InputError
from scalegpt.hardware.gpus import catalogue, find_card, known_card, peak_flops, user_file

NEW = """\
- name: RTX 5090 D
  capability: 8.6
  gib: [11.76, nvidia-smi on my machine]
  tflops: 68.2
  gbps: 912
  host_gbps: 64
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Put a text into the file that ``SCALEGPT_GPUS`` names."""

    def put(text: str) -> Path:
        path = tmp_path / "gpus.yaml"
        path.write_text(text, encoding="utf-8")
        monkeypatch.setenv("SCALEGPT_GPUS", str(path))
        return path

    return put


def test_a_card_is_added(own: Any) -> None:
    before = len(catalogue())
    path = own(NEW)
    card = find_card("rtx5090d")
    assert (card.name, card.gb, card.tflops, card.link, card.link_gbps) == ("RTX 5090 D", 12, 68.2, "pcie", 64)
    assert card.peer is False
    assert card.sources == {
        "gib": "nvidia-smi on my machine", "tflops": f"{path}:1", "gbps": f"{path}:1", "host_gbps": f"{path}:1",
        "link_gbps": f"{path}:1", "peer": "~assumed",
    }  # fmt: skip
    assert len(catalogue()) == before + 1
    assert known_card("NVIDIA GeForce RTX 5090 D") == card
    assert known_card("NVIDIA GeForce RTX 5090") == find_card("5090")
    assert peak_flops("NVIDIA GeForce RTX 5090 D", "bf16") == 68.2e12


def test_a_card_may_say_all_of_it(own: Any) -> None:
    own(NEW + "  link: nvlink\n  link_gbps: [100, me]\n  link_cards: 2\n  peer: [true, me]\n  gb: 13\n"
        "  match: [mine]\n  aliases: [my-card]\n")  # fmt: skip
    card = find_card("my-card")
    assert (card.link, card.link_gbps, card.link_cards, card.peer, card.gb) == ("nvlink", 100, 2, True, 13)
    assert known_card("MINE 5") == card
    assert card.link_of(4).gbps == 64


def test_a_card_may_have_a_price(own: Any) -> None:
    path = own("- name: RTX 4090\n  price_per_gpu_hour: 0.35\n" + NEW + "  price_per_gpu_hour: [1.5, my provider]\n")
    assert (find_card("4090").price_per_gpu_hour, find_card("5090d").price_per_gpu_hour) == (0.35, 1.5)
    assert find_card("4090").sources["price_per_gpu_hour"] == f"{path}:1"
    assert find_card("5090d").sources["price_per_gpu_hour"] == "my provider"
    assert find_card("a100-40gb").price_per_gpu_hour is None


@pytest.mark.parametrize("name", ["RTX 4090", "rtx4090", "4090", "GeForce RTX 4090"])
def test_figures_of_a_known_card_are_overridden(own: Any, name: str) -> None:
    before = find_card("4090")
    path = own(f"# mine\n\n- name: {name}\n  peer: true\n  host_gbps: [32, x8 slot]\n")
    card = find_card("4090")
    assert (card.name, card.peer, card.host_gbps, card.link_gbps) == ("RTX 4090", True, 32, 32)
    assert (card.sources["peer"], card.sources["host_gbps"]) == (f"{path}:3", "x8 slot")
    assert (card.gib, card.tflops, card.gbps, card.sources["gib"]) == (
        before.gib,
        before.tflops,
        before.gbps,
        before.sources["gib"],
    )
    assert len(catalogue()) == len({each.name for each in catalogue()})


def test_more_memory_than_the_name_says_is_a_larger_card(own: Any) -> None:
    own("- name: RTX 4090\n  gib: 47.4\n")
    assert find_card("rtx4090-48gb").usable_bytes == int(47.4 * 2**30)


def test_an_override_keeps_a_link_that_is_not_pcie(own: Any) -> None:
    own("- {name: A100 40GB, host_gbps: 32}\n- {name: H100 SXM, link: pcie}\n")
    assert (find_card("a100-40gb").link_gbps, find_card("a100-40gb").host_gbps) == (600, 32)
    assert (find_card("h100").link, find_card("h100").link_gbps) == ("pcie", 128)


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "[]"])
def test_an_empty_file_changes_nothing(own: Any, text: str) -> None:
    before = catalogue()
    own(text)
    assert catalogue() == before


def test_where_the_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SCALEGPT_GPUS")
    assert user_file() is None
    path = tmp_path / ".config/scalegpt/gpus.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(NEW)
    assert user_file() == path
    assert find_card("5090d").gbps == 912
    monkeypatch.setenv("SCALEGPT_GPUS", "~/other.yaml")
    assert user_file() == tmp_path / "other.yaml"
    monkeypatch.setenv("SCALEGPT_GPUS", "")
    assert user_file() is None


BAD = {
    "name: RTX 4090": ":1: the file must be a list of cards, as in `scalegpt gpus --help`",
    "- RTX 4090": ":1: a card must be a mapping such as `name: RTX 4090`",
    "- gbps: 5": ":1: a card without a name",
    "- name: RTX 4090\n  gbsp: 5": ":2: unknown key 'gbsp'; did you mean gbps",
    "- name: RTX 4090\n  gbps: fast": ":2: gbps must be a number above 0 and below 1,000,000, not 'fast'",
    "- name: RTX 4090\n  gbps: 0": ":2: gbps must be a number above 0",
    "- name: RTX 4090\n  price_per_gpu_hour: -1": ":2: price_per_gpu_hour must be a number above 0",
    "- name: RTX 4090\n  gbps: -5": ":2: gbps must be a number above 0",
    "- name: RTX 4090\n  gbps: nan": ":2: gbps must be a number above 0",
    "- name: RTX 4090\n  gbps: .inf": ":2: gbps must be a number above 0",
    "- name: RTX 4090\n  gbps: 1e12": ":2: gbps must be a number above 0 and below 1,000,000",
    "- name: RTX 4090\n  gbps:": ":2: gbps must be one value, not nothing",
    "- name: RTX 4090\n  gbps: [5]": ":2: gbps must be a value, or [value, source]",
    "- name: RTX 4090\n  gbps: [5, a, b]": ":2: gbps must be a value, or [value, source]",
    "- name: RTX 4090\n  gbps: {a: 5}": ":2: gbps must be one value, not several",
    "- name: RTX 4090\n  gb: 1.5": ":2: gb must be a whole number above 0 and below 1,000,000, not '1.5'",
    "- name: RTX 4090\n  link: bus": ":2: link must be one of nvlink, xgmi, pcie, not 'bus'",
    "- name: RTX 4090\n  link_cards: 0": ":2: link_cards must be a whole number above 0",
    "- name: RTX 4090\n  peer: maybe": ":2: peer must be true or false, not 'maybe'",
    "- name: RTX 4090\n  capability: sm_89": ":2: capability must be a compute capability (8.6)",
    "- name: RTX 4090\n  match: 4090": ":2: match must be a list of words",
    "- name: RTX 4090\n  gbps: 5\n  gbps: 6": ":3: gbps appears twice; keep one of them",
    "- name: RTX 4090\n  gbps: 5\n- name: rtx 4090\n  tflops: 6": ":3: rtx 4090 is already defined at ",
    "- name: T4\n  gbps: 5\n\n- name: Mine\n  gib: 8": ":4: Mine is a new card and lacks capability, tflops, gbps, host_gbps",
    NEW + "  link: nvlink": ":1: RTX 5090 D is a new card and lacks link_gbps; add them",
    NEW + "  aliases: ['4090']": ":1: a name of RTX 5090 D already belongs to RTX 4090; choose another",
    "- name: T4\n  aliases: [l4]": ":1: a name of T4 already belongs to L4; choose another",
    "- name: RTX 4090\n\tgbps: 5": ":2: not YAML: found ",
    "- name: [RTX 4090": ":2: not YAML: ",
    "- name: RTX 4090\n  gbps: *speed": ":2: aliases (*name) are not supported; write the value itself",
    "- name: RTX 4090\n  gbps: \x01": ": not YAML: it has a character that YAML does not allow",
}


@pytest.mark.parametrize("text", BAD)
def test_a_broken_file_is_one_line_with_its_place(own: Any, text: str) -> None:
    path = own(text)
    with pytest.raises(InputError) as caught:
        find_card("4090")
    assert str(caught.value).startswith(f"{path}{BAD[text]}")
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, message in {
        "absent.yaml": ": cannot be read (No such file or directory); correct it, or set `SCALEGPT_GPUS=` to ignore it",
        "folder": ": cannot be read (Is a directory)",
        "latin.yaml": ": cannot be read (not a text file)",
        "large.yaml": " has more than 1,048,576 bytes",
    }.items():
        path = tmp_path / name
        if name == "folder":
            path.mkdir()
        elif name != "absent.yaml":
            path.write_bytes(b"# \xff" if name == "latin.yaml" else b"#" * (2**20 + 1))
        monkeypatch.setenv("SCALEGPT_GPUS", str(path))
        with pytest.raises(InputError) as caught:
            catalogue()
        assert str(caught.value).startswith(f"{path}{message}")
