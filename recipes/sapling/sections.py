"""What `make results` measures: the sections of each page, with their commands, and the files that these need."""

from dataclasses import dataclass

RUNS = "runs/results"
SHORT, LONG = f"{RUNS}/short", f"{RUNS}/long"
VALIDATION, MANY = f"{RUNS}/validation", f"{RUNS}/long100"


@dataclass(frozen=True)
class Section:
    """A section of a page of results."""

    title: str
    says: str
    """What is measured, in one sentence."""
    command: str
    """`twigvlm evaluate …` or `twigvlm compare …`, to which its --output is added, or a recipe that prints a table."""


def _evaluate(what: str, questions: str, options: str) -> str:
    return f"twigvlm evaluate {what} --questions {questions}/questions.json {options}"


_QUESTIONS = "recipes.sapling.questions --evaluation --split"
TRAINING, SCHEDULE, ABLATED, PROJECTOR = (f"{RUNS}/{name}" for name in ("training", "schedule", "ablated", "projector"))
MADE_FIRST = {
    f"{SHORT}/questions.json": f"{_QUESTIONS} test --count 1000 --descriptions 0 --output {SHORT}",
    f"{LONG}/questions.json": f"{_QUESTIONS} test --count 0 --descriptions 200 --long 25 --output {LONG}",
    f"{MANY}/questions.json": f"{_QUESTIONS} test --count 0 --descriptions 100 --long 100 --output {MANY}",
    f"{VALIDATION}/questions.json": f"{_QUESTIONS} validation --count 160 --descriptions 40 --long 10 --output {VALIDATION}",
    f"{ABLATED}/questions.json": f"{_QUESTIONS} test --count 1000 --descriptions 30 --output {ABLATED}",
    f"{TRAINING}/conversations.json": f"recipes.sapling.questions --split train --count 2000 --output {TRAINING}",
    f"{PROJECTOR}/projector.safetensors": f"twigvlm train visionzip --data {TRAINING}/conversations.json --out {PROJECTOR} "
    "--retain 64 --max-steps 100 --batch-size 4 --learning-rate 2e-4",
    f"{SCHEDULE}/fitprune.json": f"twigvlm train fitprune --data {TRAINING}/conversations.json --out {SCHEDULE} --retain 64",
}
"""Files that sections need -> the module that makes them, with its options."""
METHODS = (
    "twig diverse diverse+refocus:0.7 scout attention fastv pyramiddrop sparsevlm sparsevlm-v2 mustdrop "
    f"fitprune:{SCHEDULE} visionzip fastervlm divprune scope dart vispruner cdpruner prunesid holov "
    "prumerge+ random random:0"
)
PAGES = {
    "sapling": [
        Section(
            "Sprites that training saw",
            "Scenes of the test split, greedy, no pruning.",
            "python -m recipes.sapling.evaluate --questions 300 --descriptions 30 --long 8",
        ),
        Section(
            "Sprites of another style",
            "The same kinds of things as another artist draws them, in the scenes that need no other.",
            "python -m recipes.sapling.evaluate --questions 120 --descriptions 12 --long 4 --style emojione",
        ),
    ],
    "accuracy": [
        Section(
            "Short answers",
            "The shipped twig: the tokens with the highest scores, and those that also differ from each other (`diverse`). "
            "Beside it the two methods without training that come nearest to it.",
            _evaluate("accuracy", SHORT, "--methods twig diverse cdpruner divprune --budgets 192 64 48"),
        ),
        Section(
            "Long answers",
            "Choices made once at the end of the prompt, and a choice that is made again while the answer grows.",
            _evaluate("accuracy", LONG, "--methods twig diverse diverse+refocus:0.7 --budgets 192 128 64"),
        ),
        Section(
            "When to choose again, on the validation split",
            "With a lower τ, tokens are chosen again less often.",
            _evaluate(
                "accuracy",
                VALIDATION,
                "--kinds description rows halves 'all signs' 'three questions' "
                "--methods twig diverse refocus:0.7 diverse+refocus:0.7 refocus:0.8 diverse+refocus:0.8 refocus:0.9 --budgets 64",
            ),
        ),
        Section(
            "What late layers see, on the validation split",
            "Short answers and descriptions. With φ = 0 no visual token goes on after layer K_f, as published.",
            _evaluate(
                "sweep",
                VALIDATION,
                "--kinds place where relation exists count 'sign text' 'sign colour' 'next to' description "
                "--method diverse --final-wipes 24 30 --final-shares 0 0.15 0.3 --budgets 64",
            ),
        ),
        Section(
            "Which layers know what matters, on the validation split",
            "Short answers, pruned by the base's own attention after a full pass: what the P-Head can learn from one deep layer, "
            "and from the mean of several.",
            _evaluate(
                "accuracy",
                VALIDATION,
                "--kinds place where relation exists count 'sign text' 'sign colour' 'next to' "
                "--methods deep:15 deep:18 deep:21 deep:24 deep:15-24 --budgets 64",
            ),
        ),
        Section(
            "Scout mode and the cut after layer K: short answers",
            "The twig's ranking after layer K, as published, and before the decoder, as vLLM needs it.",
            _evaluate("accuracy", SHORT, "--methods twig scout --budgets 64"),
        ),
        Section(
            "Scout mode and the cut after layer K: descriptions",
            "The same for 100 descriptions.",
            _evaluate("accuracy", LONG, "--kinds description --limit 100 --methods twig scout --budgets 64"),
        ),
        Section(
            "Budgets fitted to the question",
            "Short answers: as many tokens as hold a share of the twig's scores, against as many for every question; the "
            "share is calibrated on the other half of the questions.",
            f"python -m recipes.sapling.fitted --questions {SHORT}/questions.json --output {RUNS}/fitted --budgets 192 128 64 48",
        ),
        Section(
            "Dropped tokens merged into kept ones, on the validation split",
            "160 short questions, 40 whose answers are long, and 40 descriptions, R̄ = 64: after layer K each kept token takes "
            "up a share of the mean of the dropped ones that are most like it.",
            f"python -m recipes.sapling.merged --questions {VALIDATION}/questions.json --output {RUNS}/merged",
        ),
    ],
    "ablations": [
        Section(
            "What each stage teaches, from 800 conversations",
            "Twigs of the shape that ships, trained from scratch on the same conversations (few-rl continues from few); short "
            "answers at R̄ = 64, and chains of up to five tokens in 30 descriptions without pruning.",
            f"python -m recipes.sapling.ablations --data {TRAINING} --questions {ABLATED} --output {RUNS}/ablations "
            "--runs few-first few few-answers few-rl",
        ),
    ],
    "speed": [
        Section(
            "Descriptions and other long answers",
            "One prompt at a time.",
            _evaluate(
                "speed",
                LONG,
                "--kinds description rows halves --limit 20 --repeats 1 --budgets 64 "
                "--systems chain auto 'twig + auto' 'diverse + auto' 'diverse+refocus:0.7 + auto'",
            ),
        ),
        Section(
            "Short answers",
            "One prompt at a time.",
            _evaluate("speed", SHORT, "--kinds --limit 40 --repeats 1 --budgets 64 --systems chain auto 'twig + auto'"),
        ),
    ],
    "compare": [
        Section(
            "All methods at R̄ = 64",
            "Every published method that this project has, and the twig.",
            f"twigvlm compare --questions {SHORT}/questions.json --methods {METHODS} --budgets 64 --timed 0 --no-figure",
        ),
        Section(
            "All methods under three budgets",
            "The same on the first 180 questions.",
            f"twigvlm compare --questions {SHORT}/questions.json --limit 180 --methods {METHODS} --budgets 192 128 64 --timed 0",
        ),
        Section(
            "Speed of the best, with the quality of the same answers",
            "Descriptions, one prompt at a time, with the twig's drafts and without.",
            f"twigvlm compare --questions {LONG}/questions.json --kinds description --limit 12 "
            "--methods twig diverse cdpruner divprune --budgets 64 --speculate none auto --timed 12 --no-figure",
        ),
        Section(
            "VisionZip with a tuned projector",
            "VisionZip‡: in place of the base's projector a copy, trained on 400 conversations at a learning rate of 2e-4.",
            f"twigvlm compare --questions {SHORT}/questions.json --limit 300 --methods visionzip visionzip:{PROJECTOR} "
            "--budgets 64 --timed 0 --no-figure",
        ),
    ],
    "exactness": [
        Section(
            "Long answers, with refocusing",
            "Every way to draft against no drafts, token for token; kept tokens are exchanged while the answers grow.",
            _evaluate("exactness", LONG, "--limit 10 --method refocus:0.7 --budgets 64"),
        ),
        Section(
            "More long answers, with refocusing",
            "The same, for the pruned answers alone, of descriptions and of the four other long kinds.",
            _evaluate(
                "exactness",
                MANY,
                "--method refocus:0.7 --budgets 64 --checks 'pruned chain' 'pruned tree' 'pruned auto' 'pruned lookup'",
            ),
        ),
    ],
}
