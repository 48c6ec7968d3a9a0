from topology.pace import LINE_S, Pace


def test_lines() -> None:
    """A line every few seconds: how much, how fast since this began here, how long still."""
    pace = Pace()

    assert pace.line("fetch", "bytes", 1000, 9000, 100.0) is None
    assert pace.line("fetch", "bytes", 1500, 9000, 101.0) is None
    assert pace.line("fetch", "bytes", 3000, 9000, 100.0 + LINE_S) == (
        "fetch: 3,000 of 9,000 bytes, 33%, 400/s, 15 s left"
    )
    assert pace.line("fetch", "bytes", 3500, 9000, 101.0 + LINE_S) is None
    assert pace.line("prove", "keys", 7, 0, 200.0) is None
    assert pace.line("prove", "keys", 17, 0, 200.0 + LINE_S) == "prove: 17 keys, 2/s"
    assert pace.line("prove", "keys", 7, 70, 200.0 + 2 * LINE_S) == "prove: 7 keys, 0/s"
