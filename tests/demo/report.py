"""What the demo shows at its end: a table, a plot for the terminal and one as a PNG, and what was wrong.

moved and protected are what act_one() and act_two() of demo.py return; heard is the order in which hosts were heard with the
guest's address, as the capture has it. Times are seconds of time.time()."""

import os
import shutil
import statistics
import subprocess


class DrawError(Exception):
    pass


def _should_be_heard(protected):
    """At the start, there, back, after the failover, while that host is emptied, back. More turns than these, and two copies sent
    at a time."""
    return ["a", "b", "a", protected["backup"], protected["empty"]["via"], protected["backup"]]


def wrong(moved, protected, bad_pages, heard):
    """What must not have happened and did, a sentence each."""
    found = []
    if moved["client"]["lost"]:
        found.append("%d requests were lost: %s" % (moved["client"]["lost"], moved["client"]["first_error"]))
    if moved["client"]["reconnects"]:
        found.append("the first client's connection broke %d times" % moved["client"]["reconnects"])
    found += ["the counting client: " + what for what in protected["broken"]]
    if heard != _should_be_heard(protected):
        found.append("the guest was heard on hosts %s, one after the other; it should be %s"
                     % (" ".join(heard), " ".join(_should_be_heard(protected))))
    found += ["a small guest: " + what for what in protected["empty"]["small"]]
    if bad_pages:
        found.append("the guest found %d pages of its memory changed" % bad_pages)
    return found


# ---- the table -----------------------------------------------------------------------------------------------------------

NAME_WIDTH, CELL = 40, 14
SPAN = 2 * CELL + 3     # of a value over both columns


def _size(count):
    return "%.2f MB" % (count / 1e6) if count >= 1e6 else "%.0f kB" % (count / 1e3)


def _wait_ms(answers, start, end):
    """Half of the answers that were asked for in that time took less."""
    return statistics.median((received - sent) * 1e3 for _, sent, received in answers if start <= sent <= end)


def _row(name, *values):
    width = SPAN if len(values) == 1 else CELL
    print("| %-*s |%s" % (NAME_WIDTH, name, "".join(" %*s |" % (width, value) for value in values)))


def _line(columns=1):
    print("+" + "-" * (NAME_WIDTH + 2) + ("+" + "-" * ((SPAN if columns == 1 else CELL) + 2)) * columns + "+")


def print_table(moved, protected, bad_pages, heard):
    moves, status, client, counter = moved["moves"], protected["status"], moved["client"], protected["client"]
    epochs = status["epochs_per_s"]
    print()
    _line(2)
    _row("migration", *["%s -> %s" % (move["from"], move["to"]) for move in moves])
    _line(2)
    _row("  rounds of memory copied", *["%d" % move["rounds"] for move in moves])
    _row("  bytes over the link", *["%.1f MB" % (move["wire_bytes"] / 1e6) for move in moves])
    _row("  total time", *["%.2f s" % (move["total_ms"] / 1e3) for move in moves])
    _row("  downtime, as the client saw it", *["%.1f ms" % move["downtime_ms"] for move in moves])
    _line(2)
    _row("the client of both migrations", "")
    _row("  requests answered", "%d" % (client["requests"] - client["lost"]))
    _row("  lost or wrongly answered", "%d" % client["lost"])
    _row("  longest wait for an answer", "%.1f ms" % client["longest_ms"])
    _row("  TCP connection kept", "yes" if not client["reconnects"] and not client["lost"] else "NO")
    _line()
    _row("protection of host a's guest by host " + protected["backup"], "")
    _row("  epochs a second", "%.1f" % epochs)
    _row("  the guest's pause for one, p50 / p99", "%.1f / %.1f ms" % (status["pause_p50_ms"], status["pause_p99_ms"]))
    _row("  changed in one / sent for it", "%s / %s" % (_size(status["raw_bytes_per_s"] / epochs),
                                                        _size(status["wire_bytes_per_s"] / epochs)))
    _row("  an answer takes before / with it, p50",
         "%.1f / %.1f ms" % (_wait_ms(protected["answers"], 0, protected["start"]),
                             _wait_ms(protected["answers"], protected["ready"], protected["died"])))
    _line()
    _row("death of host a", "")
    _row("  failover, as the client saw it", "%.0f ms" % protected["stall_ms"])
    _row("  protected again after", "%.1f s" % (protected["again"] - protected["died"]))
    _line()
    empty = protected["empty"]
    _row("host %s emptied, three guests" % protected["backup"], "")
    _row("  gone after / back after", "%.1f / %.1f s" % (empty["emptied_s"], empty["filled_s"]))
    _row("  longest wait for an answer", "%.0f ms" % max([stall["stall_ms"] for stall in empty["stalls"]], default=0))
    _line()
    _row("the client of all that", "")
    _row("  acknowledged INCRs", "%d" % counter["acked"])
    _row("  lost of them", "%d" % counter["forgotten"])
    _row("  TCP connection kept", "yes" if counter["error"] is None else "NO")
    _line()
    _row("from the first migration to the end", "")
    _row("  hosts heard, one after the other", " ".join(heard))
    _row("  two copies heard", "never" if heard == _should_be_heard(protected) else "YES")
    _row("  memory pages found changed", "%d" % bad_pages)
    _line()


# ---- the plot ------------------------------------------------------------------------------------------------------------


class Panel:
    """One plot: the migration link's MB/s, what the client saw, and shaded spans of time with a word on each."""

    def __init__(self, base, name, title, start, end, samples):
        self.base, self.name, self.title, self.start, self.seconds = base, name, title, start, end - start
        # What a sample says was so, on average, since the one before: it is drawn in the middle between the two.
        self.wire = self._within([((earlier[0] + now[0]) / 2, now[1]) for earlier, now in zip(samples, samples[1:])])
        self.spans = []

    def _within(self, points):
        return [(at - self.start, value) for at, value in points if 0 <= at - self.start <= self.seconds]

    def client(self, points, label, style, logarithmic=False):
        self.points, self.label, self.style, self.logarithmic = self._within(points), label, style, logarithmic

    def span(self, start, end, word, color):
        self.spans.append((start - self.start, end - self.start, word, color))

    def write(self):
        for kind, points in (("wire", self.wire), ("client", self.points)):
            with open("%s-%s-%s.dat" % (self.base, self.name, kind), "w") as f:
                f.writelines("%.4f %.4f\n" % point for point in points)

    def script(self, terminal):
        """gnuplot's commands; for the terminal without colours and shades."""
        top = max(value for _, value in self.points)
        client_range = "[0.1:%g]\nset logscale y2" % (3 * top) if self.logarithmic else "[0:%g]" % (1.2 * top)
        text = ("set xrange [0:%.3f]\nset yrange [0:%.1f]\nset y2range %s\nset ytics nomirror\nset y2tics\nset key above width 2\n"
                "set xlabel 'seconds'\n" % (self.seconds, 1.2 * max(value for _, value in self.wire), client_range))
        for start, end, word, color in self.spans:
            text += "set label '%s' at %.3f, graph 0.96 center\n" % (word, (start + end) / 2)
            if not terminal:
                text += ("set object rectangle from %.3f, graph 0 to %.3f, graph 1 fillcolor rgb '%s' fillstyle solid noborder "
                         "behind\n" % (start, end, color))
        if not terminal:
            text += ("set title '%s'\nset ylabel 'migration link, MB/s'\nset y2label 'client, %s'\n"
                     "set border linecolor rgb '#606060'\n" % (self.title, self.label))
        styles = ("impulses", "points pointtype 'o'") if terminal else \
            ("filledcurves y1=0 fillcolor rgb '#7fb2dd' fillstyle transparent solid 0.6", self.style)
        text += ("plot '{0}-wire.dat' using 1:2 with {1} title 'migration link, MB/s', "
                 "'{0}-client.dat' using 1:2 axes x1y2 with {2} title 'client, {3}'\n"
                 .format("%s-%s" % (self.base, self.name), *styles, self.label))
        return text + "unset label\nunset object\nunset logscale y2\n"


def _panels(base, samples, moved, protected):
    first = Panel(base, "move", "A guest under load moves from host a to host b and back", moved["start"], moved["end"], samples)
    beats = moved["beats"]
    first.client([((earlier["now"] + now["now"]) / 2, now["requests"] / (now["now"] - earlier["now"]))
                  for earlier, now in zip(beats, beats[1:])], "answers a second", "lines linewidth 2 linecolor rgb '#c0392b'")
    for move in moved["moves"]:
        first.span(move["start"], move["end"], "%s to %s, %.0f ms down" % (move["from"], move["to"], move["downtime_ms"]), "#dce9f5")

    second = Panel(base, "protect", "It is protected, its host dies, it goes on: every answer to the client is a dot",
                   protected["begin"], protected["end"], samples)
    second.client([(received, (received - sent) * 1e3) for _, sent, received in protected["answers"]],
                  "ms waited for each answer", "points pointtype 7 pointsize 0.4 linecolor rgb '#c0392b'", logarithmic=True)
    second.span(protected["start"], protected["ready"], "first copy", "#dce9f5")
    second.span(protected["ready"], protected["died"], "protected", "#ffffff")
    second.span(protected["died"], protected["again"], "a is dead, next copy", "#f8e0dc")
    return first, second


def draw(samples, moved, protected, png):
    """Writes the PNG and what it is made of, and prints the same small for the terminal."""
    os.makedirs(os.path.dirname(os.path.abspath(png)), exist_ok=True)
    panels = _panels(os.path.splitext(png)[0], samples, moved, protected)
    for panel in panels:
        panel.write()
    columns = max(60, min(110, shutil.get_terminal_size((100, 24)).columns))
    script = ("set terminal pngcairo size 1100,960 font 'DejaVu Sans,11'\nset output '%s'\nset multiplot layout 2,1\n" % png +
              "".join(panel.script(terminal=False) for panel in panels) + "unset multiplot\nunset output\n"
              "reset\nset terminal dumb size %d,18 aspect 1\n" % columns +
              "".join(panel.script(terminal=True) for panel in panels))
    done = subprocess.run(["gnuplot"], input=script, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0 or not os.path.exists(png):
        raise DrawError("gnuplot: " + done.stderr.strip())
    for panel, picture in zip(panels, done.stdout.strip("\f\n").split("\f")):
        print("\n%s\n%s" % (panel.title, "\n".join(line.rstrip() for line in picture.strip("\n").splitlines())))
