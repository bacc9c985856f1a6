"""The paper's layer-wise errors, to draw beside ours."""

from train.config.images import Experiment

SOURCE = "Ben-Yair, Ben Shalom, Eliasof and Treister, 2022"

# By network and form: the paper's figure, block by block, to three decimals.
CURVES = {
    "resnet56, CIFAR-10": {
        "symmetric": (
            ".070 .061 .056 .052 .053 .053 .054 .053 .050 .036 .036 .036 .038 .037 .038 .039 .039 .039 .028 "
            ".030 .032 .035 .039 .045 .056 .076"
        ),
        "plain": (
            ".094 .104 .111 .119 .127 .136 .143 .149 .151 .112 .120 .130 .138 .148 .156 .167 .186 .192 .121 "
            ".129 .136 .141 .143 .141 .140 .138"
        ),
    },
    "resnet56, CIFAR-100": {
        "symmetric": (
            ".034 .033 .030 .030 .027 .028 .029 .028 .028 .020 .019 .023 .027 .029 .030 .033 .035 .039 .030 "
            ".033 .039 .047 .063 .100 .146 .201"
        ),
        "plain": (
            ".180 .203 .230 .243 .277 .298 .277 .324 .357 .267 .270 .279 .292 .306 .316 .368 .442 .456 .348 "
            ".381 .414 .441 .472 .499 .534 .590"
        ),
    },
    "mobilenetv2, CIFAR-100": {
        "symmetric": ".111 .102 .073 .111 .087 .080 .109 .088 .085 .081 .114 .072 .067 .101 .059 .051",
        "plain": ".115 .140 .173 .187 .234 .286 .184 .191 .220 .235 .217 .211 .228 .218 .242 .267",
    },
}


def nearest(experiment: Experiment) -> tuple[str, dict[str, list[float]]]:
    """The published network most like an experiment's: its name, and by form the error of each block."""
    if "mobilenet" in experiment.model.name:
        name = "mobilenetv2, CIFAR-100"
    elif "cifar100" in experiment.data.name:
        name = "resnet56, CIFAR-100"
    else:
        name = "resnet56, CIFAR-10"
    return name, {form: [float(value) for value in values.split()] for form, values in CURVES[name].items()}
