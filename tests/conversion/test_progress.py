from dapo_megatron.conversion import progress
from dapo_megatron.conversion.progress import counting


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with counting("writing", 3_000_000_000) as counter:
        counter.advance(1_000_000_000)
        counter._bar.refresh()
    shown = capsys.readouterr().err
    assert "writing" in shown and "1.0/3.0 GB" in shown


def test_lines_now_and_then_elsewhere(monkeypatch, capsys):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    with counting("writing", 4_000_000_000) as counter:
        counter.advance(1_000_000_000)
        assert capsys.readouterr().err == ""
        monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
        counter.advance(1_000_000_000)
    assert capsys.readouterr().err == "writing: 2.0 of 4.0 GB, 50 %\n"
