"""A static check of what ptxas made: reads of registers that some path never wrote.

ptxas 12.8 miscompiled fp8 packing so (an F2FP merged into a register that was never written) where LLVM had folded
masked columns to one constant; `kernels._common.hopper_gluon.opaque` avoids it, and this check would find it again.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.kernels.offline import PTXAS

# Opcodes whose operands are all read.
WITHOUT_RESULT = (
    "ST", "SYNCS", "BAR", "BRA", "BRX", "UTMA", "WARPGROUP", "DEPBAR", "MEMBAR", "FENCE", "EXIT", "NOP", "ISETP",
    "FSETP", "PLOP3", "VOTE", "R2UR", "USETMAXREG", "NANOSLEEP", "WARPSYNC", "ELECT", "UISETP", "BSSY", "BSYNC",
    "RPCMOV", "CCTL",
)  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    text: str
    predicated: bool
    targets: tuple[str, ...]

    @property
    def opcode(self) -> str:
        return self.text.split()[0]


@cache
def disassemble(cubin: bytes) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions in order, and the index that each label stands before."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [str(PTXAS.with_name("nvdisasm")), "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    pending: list[str] = []
    for line in text.splitlines():
        if label := re.match(r"^(\.L_x_\d+):", line):
            pending.append(label[1])
        elif found := re.search(r"/\*([0-9a-f]{4,5})\*/\s+(.*?)\s*;", line):
            labels.update(dict.fromkeys(pending, len(instructions)))
            pending = []
            guard = re.match(r"@(!?)(U?P\w+)\s+(.*)", found[2])
            targets = tuple(re.findall(r"\.L_x_\d+", line))
            instructions.append(Instruction(guard[3] if guard else found[2], bool(guard), targets))
    return instructions, labels


def undefined_reads(cubin: bytes) -> list[str]:
    """Instructions that read a register which some path to them has not written."""
    instructions, labels = disassemble(cubin)
    # Sets of registers as the bits of an integer.
    effects = [tuple(map(_bits, _effects(instruction.text))) for instruction in instructions]
    defined: list[int | None] = [None] * len(instructions)
    defined[0] = 0
    work = [0]
    while work:
        index = work.pop()
        before = defined[index]
        assert before is not None
        after = before | effects[index][0]  # a predicated definition counts as one
        for successor in _successors(instructions, labels, index):
            known = defined[successor]
            merged = after if known is None else known & after
            if merged != known:
                defined[successor] = merged
                work.append(successor)
    return [
        instruction.text
        for instruction, (_, used), known in zip(instructions, effects, defined, strict=True)
        if known is not None and used & ~known
    ]


def inner_loops(cubin: bytes, opcode: str) -> list[list[Instruction]]:
    """The innermost loops among those that hold an instruction whose name contains `opcode`: all from the target of a
    backward branch to the branch."""
    instructions, labels = disassemble(cubin)
    spans = [
        range(labels[target], index + 1)
        for index, instruction in enumerate(instructions)
        for target in instruction.targets
        if instruction.opcode == "BRA" and labels.get(target, index + 1) <= index
    ]
    held = [span for span in spans if any(opcode in instructions[index].opcode for index in span)]
    inner = [a for a in held if not any(b != a and b.start >= a.start and b.stop <= a.stop for b in held)]
    return [instructions[span.start : span.stop] for span in inner]


def clears_one_bit(text: str) -> bool:
    """Whether an instruction clears a bit of a register in place: ptxas keeps a predicate there, and of such a register
    it tests single bits alone, each after it was set or cleared.
    """
    found = re.fullmatch(r"LOP3\.LUT (R\d+), \1, 0x([0-9a-f]{1,8}), RZ, 0xc0, !PT", text)
    return found is not None and (0xFFFFFFFF ^ int(found[2], 16)).bit_count() == 1


def _bits(registers: set[int]) -> int:
    return sum(1 << number for number in registers)


def _registers(text: str) -> set[int]:
    found = set()
    for match in re.finditer(r"\bR(\d+)(\.64)?", text):
        found.add(int(match[1]))
        if match[2]:
            found.add(int(match[1]) + 1)
    return found


def _effects(text: str) -> tuple[set[int], set[int]]:
    """(registers written, registers read)."""
    opcode = text.split()[0]
    rest = text[len(opcode) :]
    operands = [part.strip() for part in rest.split(",")]
    if "GMMA" in opcode:
        shape = re.search(r"64x(\d+)x", opcode)
        assert shape, text
        first = int(operands[0][1:])
        accumulator = set(range(first, first + int(shape[1]) // 2))
        used = accumulator.copy() if operands[0] in operands[1:] else set()
        if re.match(r"R\d+", operands[1]):
            first = int(re.findall(r"\d+", operands[1])[0])
            used |= set(range(first, first + 4))
        return accumulator, used
    if opcode.startswith(WITHOUT_RESULT):
        used = _registers(rest)
        if opcode.startswith("STSM") and ".4" in opcode:
            last = int(re.findall(r"\bR(\d+)\b", rest)[-1])
            used |= {last + 1, last + 2, last + 3}
        return set(), used
    place = 1 if opcode.startswith("SHFL") else 0
    if re.match(r"(PT|P\d|UP\d)", operands[place]) and re.match(r"R\d+", (*operands, "")[place + 1]):
        place += 1
    written = set()
    if target := re.match(r"R(\d+)", operands[place]):
        written.add(int(target[1]))
        if ".64" in opcode or opcode.startswith("CS2R") or ".WIDE" in opcode:
            written.add(int(target[1]) + 1)
        if ".128" in opcode:
            written |= {int(target[1]) + offset for offset in (1, 2, 3)}
    return written, _registers(",".join(operands[place + 1 :]))


def _successors(instructions: list[Instruction], labels: dict[str, int], index: int) -> list[int]:
    instruction = instructions[index]
    following = [index + 1] if index + 1 < len(instructions) else []
    if instruction.opcode.startswith("BRX"):
        return [labels[target] for target in instruction.targets if target in labels]
    if instruction.opcode.startswith("BRA"):
        return [labels[instruction.targets[0]], *(following if instruction.predicated else [])]
    if instruction.opcode.startswith("EXIT") and not instruction.predicated:
        return []
    return following
