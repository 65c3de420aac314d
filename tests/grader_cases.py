"""Answers beside references, and whether they mean the same; MATH-format problems of our own."""

SAME = [
    ("1000", "1,000"), ("1000", "1{,}000"), ("1000", r"1\,000"), ("1000", "1 000"), ("1000", "1000.00"), ("18", "$18"),
    ("18", r"\$18"), ("18", "18 dollars"), ("18", "18."), ("10", r"10\text{ cm}"), ("10", r"10\text{ cm}^2"),
    ("5", "5 apples"), ("80000", "$80,000"), ("1000.5", "1,000.50"), ("-3", "- 3"), (r"\frac12", "0.5"),
    (r"\frac{1}{2}", "1/2"), (r"\frac{1}{2}", r"\dfrac{1}{2}"), (r"\frac{3}{4}", "0.75"), (r"\frac52", r"2\frac12"),
    ("2.5", "2 1/2"), ("50", r"50\%"), ("50", "50%"), (r"50\%", "0.5"), ("90", r"90^\circ"), ("5", "x = 5"),
    (r"2\sqrt{3}", r"\sqrt{12}"), ("2x+1", "1+2x"), ("x^2+2x+1", "(x+1)^2"), (r"\frac{\pi}{2}", r"\pi/2"),
    ("10^6", "1000000"), (r"\{1,2\}", r"\{2,1\}"), ("1,2,3", "3, 2, 1"), ("(1,2)", r"\left(1, 2\right)"),
    ("(-\\infty, 2)", r"\left(-\infty,2\right)"), ("A", r"\text{(A)}"), ("B", "(B)"),
    (r"\text{(C)}", "C"), (r"\text{east}", r"\text{east}"), (r"\text{east}", "east"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"), (r"3\sqrt{2}", "$3\\sqrt{2}$"),
]  # fmt: skip
"""(reference, answer) that are equal."""

DIFFERENT = [
    ("3", "3.1"), ("1000", "100"), ("1000", "1,00"), ("5", "-5"), (r"\frac12", r"\frac13"), (r"\frac13", "0.333"),
    ("(1,2)", "(2,1)"), ("(1,2)", "1,2"), ("(1,3)", "3,1"),
    ("(1,2)", "[1,2]"), ("(1,2)", "(1,2]"), ("1,2,3", "1,2"), ("3.4", "3,4"), ("50", r"5\%"),
    ("x^2", "x^3"), ("2x+1", "2x"), ("A", "B"), (r"\text{(A)}", r"\text{(B)}"), (r"\text{east}", r"\text{west}"),
    (r"2\sqrt{3}", r"3\sqrt{2}"), (r"\frac{\pi}{2}", r"\frac{\pi}{3}"), ("18", "81"),
    ("18", "18 or 19"), ("7", "seven"),
]  # fmt: skip
"""(reference, answer) that are not."""

MATH = [
    {"problem": "What is $\\frac13+\\frac16$?", "level": "Level 1", "type": "Algebra",
     "solution": "Common denominators give $\\frac26+\\frac16=\\boxed{\\frac{1}{2}}$."},
    {"problem": "Solve $x^2=9$ for $x>0$.", "level": "Level 1", "type": "Algebra",
     "solution": "The positive root is $x=\\boxed{3}$."},
    {"problem": "Write the interval of all $x$ with $|x|<2$.", "level": "Level 2", "type": "Intermediate Algebra",
     "solution": "This is $-2<x<2$, or $\\boxed{(-2,2)}$."},
    {"problem": "Where do $y=x$ and $y=2-x$ meet?", "level": "Level 2", "type": "Intermediate Algebra",
     "solution": "At $x=1$, so at $\\boxed{\\left(1,1\\right)}$."},
    {"problem": "How many ways are there to order $7$ books?", "level": "Level 3", "type": "Counting & Probability",
     "solution": "$7!=\\boxed{5{,}040}$."},
    {"problem": "Which is larger, (A) $2^5$ or (B) $5^2$?", "level": "Level 1", "type": "Prealgebra",
     "solution": "$2^5=32>25$, so $\\boxed{\\text{(A)}}$."},
    {"problem": "What is the area of a circle of radius $3$ cm?", "level": "Level 2", "type": "Geometry",
     "solution": "$\\pi\\cdot 3^2=\\boxed{9\\pi\\text{ cm}^2}$."},
    {"problem": "Expand $(x+1)^2$.", "level": "Level 1", "type": "Algebra",
     "solution": "It is $\\boxed{x^2+2x+1}$."},
    {"problem": "What percent of $80$ is $20$?", "level": "Level 1", "type": "Prealgebra",
     "solution": "$\\frac{20}{80}=\\boxed{25\\%}$."},
    {"problem": "Find all $x$ with $x^2=4$.", "level": "Level 2", "type": "Algebra",
     "solution": "They are $\\boxed{-2, 2}$."},
    {"problem": "Compute $\\sqrt{12}$.", "level": "Level 1", "type": "Prealgebra",
     "solution": "$\\sqrt{4\\cdot3}=\\boxed{2\\sqrt{3}}$."},
    {"problem": "On which day does a week that begins on Monday end?", "level": "Level 1", "type": "Prealgebra",
     "solution": "On $\\boxed{\\text{Sunday}}$."},
]  # fmt: skip
"""Problems in the format of MATH, made for these tests."""
