"""What a training step of every arm of a plan costs: images per second of its student, its teacher's answers included.

    make benchmark NAME=plan_steps ARGUMENTS="few_images --out results/benchmarks/few_images-steps.json"

On an idle machine, with the plan's threads. A step is zero_grad, forward, backward and AdamW on random images; augmentation and
evaluation, which are the same for all arms, are left out. `tables.times` reads it.
"""

import copy

import timing
import torch

import study
from hdkd_lib import data, experiment, recipes


def main() -> None:
    options = timing.options(__doc__, "plan")
    plan = study.expand(options.plan)
    torch.set_num_threads(plan["threads"])
    jobs = {job["arm"]: job for job in reversed(plan["jobs"].values()) if not job["report"]}
    defaults, built, steps = study._defaults("run"), {}, {}
    given = torch.Generator().manual_seed(0)

    def build(arm: str) -> experiment.Experiment:
        if arm not in built:
            of = defaults | jobs[arm]["parameters"]
            keys = ("image_size", "protocol", "fold", "fraction", "draws", "draw")
            images = data.load(of["dataset"], of["root"], **{key: of[key] for key in keys})
            teachers = [copy.deepcopy(build(plan["jobs"][name]["arm"]).task.student) for name in jobs[arm]["needs"]]
            built[arm] = experiment.build(
                images, of["network"], recipes.get(**of["recipe"]), network_options=of["network_options"],
                method=of["method"], options=of["options"],
                teacher=teachers[0] if teachers else experiment.find_teacher(of["teacher"], images),
            )  # fmt: skip
        return built[arm]

    for arm in jobs:
        of = build(arm)
        size, count = of.data.config["image_size"], of.recipe.batch_size
        images = torch.randn(count, 3, size, size, generator=given).to(options.device)
        labels = torch.randint(len(of.data.classes), (count,), generator=given).to(options.device)
        steps[arm] = timing.training_step(of.task, images, labels, options.precision)
    seconds = timing.race(steps, options.device, options.repeats)
    speed = {arm: round(built[arm].recipe.batch_size / value, 1) for arm, value in sorted(seconds.items())}
    result = {"benchmark": "plan_steps", "plan": plan["plan"], "precision": options.precision, "images_per_second": speed}
    timing.report(result, options.device, options.out)


if __name__ == "__main__":
    main()
