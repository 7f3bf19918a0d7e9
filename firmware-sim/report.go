package firmwaresim

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// Report is what a fleet has done.
type Report struct {
	Snapshot
	Duration       time.Duration `json:"duration_ns"` // of sampling
	Rate           float64       `json:"acknowledged_per_second"`
	Unacknowledged uint64        `json:"unacknowledged"` // in flash or in flight at the end
	Reconnects     uint64        `json:"reconnects"`     // connections beyond the first of each device
	Latency        Latency       `json:"ack_latency"`    // from sending to PUBACK or PUBREC
	// FirstCommand is, for each connection, the time from being ready for commands to the first one. Ready: SUBSCRIBE
	// is sent, or CONNACK says that the session with its subscription is there. It tells something where
	// commands have been waiting.
	FirstCommand Latency           `json:"first_command_latency,omitzero"`
	Errors       map[string]uint64 `json:"errors,omitempty"`
}

func (f *Fleet) report() Report {
	r := Report{Snapshot: f.Snapshot(), Duration: time.Duration(f.ended.Load()), Errors: f.Errors()}
	if s := r.Duration.Seconds(); s > 0 {
		r.Rate = float64(r.Acknowledged) / s
	}
	r.Unacknowledged = uint64(r.InFlight + r.InFlash)
	for _, d := range f.devices {
		d.mu.Lock()
		if d.counts.connects > 1 {
			r.Reconnects += d.counts.connects - 1
		}
		d.mu.Unlock()
	}
	var all histogram
	for i := range f.latency {
		all.merge(&f.latency[i])
	}
	r.Latency = all.latency()
	r.FirstCommand = f.first.latency()
	return r
}

// String is the report for a terminal.
func (r Report) String() string {
	var b strings.Builder
	line := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "%-18s ", name)
		fmt.Fprintf(&b, format+"\n", args...)
	}
	line("devices", "%d, %d connections, %d reconnects, %d failed attempts", r.Devices, r.Connects, r.Reconnects, r.FailedConnects)
	if r.Breaks+r.Crashes > 0 {
		line("simulated faults", "%d broken links, %d crashes", r.Breaks, r.Crashes)
	}
	line("published", "%d messages, %s of payload in %v", r.Published, size(r.PayloadBytes), r.Duration.Round(10*time.Millisecond))
	without := ""
	if r.QoS0 > 0 {
		without = fmt.Sprintf("; %d were QoS 0, which has no acknowledgement", r.QoS0)
	}
	line("acknowledged", "%d messages, %.0f a second%s", r.Acknowledged, r.Rate, without)
	if r.Acknowledged > 0 {
		line("ack latency", "p50 %v, p99 %v, p99.9 %v, max %v", short(r.Latency.P50), short(r.Latency.P99), short(r.Latency.P999), short(r.Latency.Max))
	}
	if r.Resent > 0 {
		line("sent again", "%d times", r.Resent)
	}
	if r.Refused > 0 {
		line("refused", "%d messages, with a reason", r.Refused)
	}
	if r.Dropped+r.Abandoned > 0 {
		line("dropped on device", "%d messages never sent, %d sent and not acknowledged", r.Dropped, r.Abandoned)
	}
	if c := r.Commands; c.Received > 0 {
		line("commands", "%d received, %d of them again, %d executed, %d outcomes acknowledged, %d open", c.Received, c.Repeats, c.Executed, c.Answered, c.Open)
		line("first command", "p50 %v, p99 %v, max %v after being ready for it", short(r.FirstCommand.P50), short(r.FirstCommand.P99), short(r.FirstCommand.Max))
	}
	if r.Commands.Strange+r.Commands.Refused > 0 {
		line("wrong commands", "%d messages that are none of the device, %d answers refused", r.Commands.Strange, r.Commands.Refused)
	}
	if r.Answers > 0 {
		line("left on device", "%d answers not acknowledged when the time was over", r.Answers)
	}
	if r.Unacknowledged > 0 {
		line("left on device", "%d messages not acknowledged when the time was over", r.Unacknowledged)
	}
	if len(r.Errors) == 0 {
		line("errors", "none")
	}
	for _, kind := range slices.Sorted(maps.Keys(r.Errors)) {
		line("errors", "%d × %s", r.Errors[kind], kind)
	}
	return b.String()
}

func short(d time.Duration) time.Duration {
	switch {
	case d < time.Millisecond:
		return d.Round(time.Microsecond)
	case d < time.Second:
		return d.Round(10 * time.Microsecond)
	}
	return d.Round(time.Millisecond)
}

func size(n uint64) string {
	unit, x := "B", float64(n)
	for _, u := range []string{"KiB", "MiB", "GiB", "TiB"} {
		if x < 1024 {
			break
		}
		unit, x = u, x/1024
	}
	if unit == "B" {
		return fmt.Sprintf("%d B", n)
	}
	return fmt.Sprintf("%.1f %s", x, unit)
}
