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
    ("18", r"\(18\)"), ("18", r"\[18\]"), ("A", "a"), ("(e)", "E"), (r"\text{(X)}", "x"),
    ("3000", "3 thousand"), ("3000", r"3\text{ thousand}"), ("36", "3 dozen eggs"), ("2500000", "$2.5 million"),
    ("500000", r"\frac12 \text{ million dollars}"), ("2500000", "2 1/2 million"), ("1500000", "1,500 thousand"),
    ("x=3000", "x = 3 thousand"), ("1.5", "3 halves"), (r"\frac23", "2 thirds"), ("5", "5 fifth graders"),
    ("3 hundred thousand", r"300{,}000"), ("50 percent", r"50\%"), ("0.5", "50 percent"), ("3 times", "3"),
    ("5 cm", r"5\text{ centimeters}"), ("5 m", "5m"), ("5 m", r"5\,\mathrm{m}"), ("5 inches", r"5\text{ in}"),
    (r"10\text{ cm}^2", "10 square centimeters"), (r"10\text{ cm}^2", "10 cm squared"),
    (r"10\text{ cubic feet}", r"10\mbox{ ft}^3"), ("40 mph", "40 miles per hour"), ("40 mph", "40 miles/hr"),
    ("10 people", r"10\text{ students}"), ("8 hours in total", "8 hours"), ("5", r"5\ \text{cm}"),
    ("3000000", "3 Million-dollar houses"), (r"20^\circ\text{ C}", "20 degrees C"), ("5 p.m.", "5 PM"),
    ("5 lbs.", "5 pounds"), ("8 hours", "8 hours of my day"),
    ("5 dollars", "5"), (r"2\sqrt{3} cm", r"\sqrt{12}"), (r"\{1,2\}", "1, 2"), ("(1,2)", "x=1, y=2"),
    ("10_2", "10_{2}"), ("2A5_{16}", "$2A5_{16}$"), ("120", "5!"), ("120", "$5!$"),
]  # fmt: skip
"""(reference, answer) that are equal."""

DIFFERENT = [
    ("3", "3.1"), ("1000", "100"), ("1000", "1,00"), ("5", "-5"), (r"\frac12", r"\frac13"), (r"\frac13", "0.333"),
    ("(1,2)", "(2,1)"), ("(1,2)", "1,2"), ("(1,3)", "3,1"),
    ("(1,2)", "[1,2]"), ("(1,2)", "(1,2]"), ("1,2,3", "1,2"), ("3.4", "3,4"), ("50", r"5\%"),
    ("x^2", "x^3"), ("2x+1", "2x"), ("A", "B"), (r"\text{(A)}", r"\text{(B)}"), (r"\text{east}", r"\text{west}"),
    (r"2\sqrt{3}", r"3\sqrt{2}"), (r"\frac{\pi}{2}", r"\frac{\pi}{3}"), ("18", "81"),
    ("18", "18 or 19"), ("7", "seven"),
    ("3", "3 thousand"), ("3", r"3\text{ million}"), ("3", "x = 3 billion"), ("3", "3 dozen"), ("300", "3 thousand"),
    ("3", "3 hundred"), ("3", "3 halves"), ("1", "1 third"), ("3", "3 squared"), ("3", r"3 \text{ cubed}"),
    ("3", "3 factorial"), ("3", "3 Million"), ("3", "3 SQUARED"), ("3", "3 million-dollar houses"), ("5 am", "5 p.m."),
    ("5", "5 and a half"), ("5", r"5\text{ and a half}"), ("300", "3 hundred twenty"),
    ("3", "3 sin x"), ("5", "5 plus x"), ("5", "5xy"), ("5", "5 hours and a half"), ("y=5", "x=5 apples"),
    ("5 cm", "5 m"), (r"5\text{ cm}", r"5\text{ m}"), ("5 cm", "5cm^2"), ("5 dollars", "5 cents"),
    (r"5\text{ cm}^2", r"5\text{ cm}^3"), ("40 mph", "40 miles"), ("3 minutes", "3 hours"), ("5 x", "5 y"),
    ("5 km/h", "5 km h"), ("(x,y)=(1,2)", "1,2"),
    ("(1,2)", r"\{1,2\}"), ("(1,2,3)", r"\{1,2,3\}"), ("[1,2]", r"\{1,2\}"),
    ("5", "6 = 5"), ("6", "6 = 5"), ("66.67", "100/3 = 66.67"),
    ("10", "10_2"), ("10", "10_{2}"), ("10_3", "10_2"), ("2", "10_2"), ("1010", r"1010_{\text{two}}"),
    ("x", "X"), ("y", "Y"), ("x", "y"), ("5", "$5!$"), ("5", "5!"), ("24", "5!"),
]  # fmt: skip
"""(reference, answer) that are not."""

ANNOUNCED = [
    ("18", "The answer is: **18**"), ("18", "**The answer is:** 18."), ("18", "**The answer is: 18.** So it is."),
    ("18", "The answer is: `18`"), ("18", "The answer is: ***18***!"), ("18", "The answer is: __18__"),
    ("18", "The answer is:\n```\n18\n```"), ("18", r"The answer is: \[18\]"), ("18", r"The answer is: \(18\)."),
    ("18", "The answer is:\n\n\\[\n18\n\\]\n"), ("18", "The answer is:\n$$\n18\n$$"),
    ("18", "The answer is: $18.$ So."), ("18", "The answer is:\n18"),
    ("18", "The answer is:\n**18**\nSo."), ("18", "The answer is:\n#### 18"),
    ("18", "The answer is:\nThe answer is: 18"), ("18", "The Answer is: 18"), ("18", "THE FINAL ANSWER IS: 18"),
    ("18", "The answer is: 18 eggs, so she makes 36 dollars."), ("18", "The answer is: 18, because 9 + 9 = 18."),
    ("18", "The answer is: 18!"), ("18", "The answer is: $18$! Well done."), ("18", "The answer is: 18 eggs!"),
    ("120", "The answer is: 5!"), ("5!", "The answer is: 5!"), ("5!", "The answer is: 120"), ("5", "The answer is: 5!"),
    ("10", "The answer is: 5 + 5 = 10"), ("66.67", "The answer is: 200/3 = 66.67."),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "The answer is:\n\\[\n\\begin{pmatrix}1\\\\\n2\\end{pmatrix}\n\\]"),
]  # fmt: skip
"""(reference, text of an answer that is right)."""

ANNOUNCED_WRONG = [
    ("36", "The answer is: 18 eggs, so she makes 36 dollars."), ("5", "The answer is: $5!$."),
    ("5", r"The answer is: $\boxed{5!}$"), ("24", "The answer is: 5!"), ("18", "The answer is: **81**"),
    ("5!", "The answer is: 5"), ("18", "The answer is:\n\n\nSome say 18"), ("18", "The answer is: 18 or 19!"),
    ("18", r"The answer is: \[81\], not \[18\]"), ("3", "The answer is: **3 thousand**!"),
    ("6", "The answer is: x = 5 = 6"), ("(1,2)", "The answer is: x=2, y=1"),
]  # fmt: skip
"""(reference, text of an answer that is wrong)."""

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
