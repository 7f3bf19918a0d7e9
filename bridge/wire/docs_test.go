package wire_test

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"holdfast/bridge/wire"
)

// block takes the first fenced code of a language out of a section of docs/formats.md.
func block(t *testing.T, section, language string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("..", "..", "docs", "formats.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(b), "\n"+section+"\n")
	if !ok {
		t.Fatalf("docs/formats.md has no section %q", section)
	}
	rest, _, _ = strings.Cut(rest, "\n"+section[:strings.Index(section, " ")+1])
	_, rest, ok = strings.Cut(rest, "\n```"+language+"\n")
	code, _, closed := strings.Cut(rest, "\n```\n")
	if !ok || !closed {
		t.Fatalf("section %q of docs/formats.md has no %s", section, language)
	}
	return code + "\n"
}

// correction is a clock that stood at 1970, as it was noticed in 2025.
const correction = 1_764_000_000_000

// docBatch is a batch as the bridge sends it, and the lines that the documented decoders print for it.
func docBatch(t *testing.T, corrected bool) (batch []byte, want []map[string]any) {
	messages := telemetry(11, 50)
	messages[1].Props = &wire.Props{ContentType: "application/json", Correlation: []byte{1}, User: [][2]string{{"a", "b"}}}
	messages[2].Payload, messages[2].Flags = []byte{0, 0xff}, wire.FlagQoS2|wire.FlagClockUnsynced
	messages[3].Payload, messages[3].Device, messages[3].Topic = []byte{}, "bed ü", "t/ü"
	h := header
	h.Count, h.Replayed = len(messages), true
	h.Corrected, h.Correction = corrected, correction
	for i, m := range messages {
		if corrected && m.Flags&wire.FlagClockUnsynced != 0 {
			m.Received, m.Flags = m.Received+correction, m.Flags-wire.FlagClockUnsynced
		}
		contentType := ""
		if m.Props != nil {
			contentType = m.Props.ContentType
		}
		want = append(want, map[string]any{
			"id": wire.ID(h.Gateway, h.Epoch, h.Lane, h.First+uint64(i)), "received": float64(m.Received), "device": m.Device,
			"topic": m.Topic, "flags": float64(m.Flags), "payload": hex.EncodeToString(m.Payload), "content_type": contentType,
		})
	}
	return wire.NewBatchEncoder().Append(nil, h, records(t, messages)), want
}

// checkDecoder feeds the batch to a documented decoder, and then what it must refuse.
func checkDecoder(t *testing.T, command ...string) {
	t.Helper()
	decode := func(input []byte) (string, error) {
		cmd := exec.CommandContext(t.Context(), command[0], command[1:]...)
		cmd.Stdin = bytes.NewReader(input)
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		err := cmd.Run()
		t.Logf("%s", stderr.Bytes())
		return stdout.String(), err
	}
	var batch []byte
	for _, corrected := range []bool{true, false} {
		var want, got []map[string]any
		batch, want = docBatch(t, corrected)
		out, err := decode(batch)
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(out) {
			var m map[string]any
			if err := json.Unmarshal([]byte(line), &m); err != nil {
				t.Fatalf("%v in %s", err, line)
			}
			got = append(got, m)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("corrected %v: %s", corrected, diff)
		}
	}

	damaged := bytes.Clone(batch)
	damaged[len(damaged)-10] ^= 1
	f := fields(t, records(t, telemetry(11, 2)), 1)
	lie := fields(t, records(t, telemetry(11, 2)), 2)
	lie[8] = 4<<20 + 1
	for name, b := range map[string][]byte{
		"a newer version": encode(t, map[uint64]any{0: 2}),
		"damaged":         damaged,
		"one too many":    encode(t, f),
		"beyond limit":    encode(t, lie),
	} {
		if out, err := decode(b); err == nil {
			t.Errorf("%s: decoded as %s", name, out)
		}
	}
}

func TestDocumentedPythonDecoder(t *testing.T) {
	python := "/usr/bin/python3" // the distribution's, where its packages are
	if err := exec.CommandContext(t.Context(), python, "-c", "import cbor2, zstandard").Run(); err != nil {
		t.Skipf("%s has no cbor2 and zstandard (Debian: python3-cbor2 python3-zstandard): %v", python, err)
	}
	file := filepath.Join(t.TempDir(), "decode.py")
	if err := os.WriteFile(file, []byte(block(t, "### A decoder in Python", "python")), 0o600); err != nil {
		t.Fatal(err)
	}
	checkDecoder(t, python, file)
}

func TestDocumentedGoDecoder(t *testing.T) {
	dir := t.TempDir()
	file, bin := filepath.Join(dir, "main.go"), filepath.Join(dir, "decode")
	if err := os.WriteFile(file, []byte(block(t, "### A decoder in Go", "go")), 0o600); err != nil {
		t.Fatal(err)
	}
	// A file named on the command line takes its imports from this module's go.mod.
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", bin, file).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	checkDecoder(t, bin)
}

func TestDocumentedExamplesAreReal(t *testing.T) {
	m := wire.Message{
		Received: 1764000000123, Device: "bed-07", Topic: "dt/icu/bed-07/vitals", Flags: wire.FlagQoS1, Payload: []byte(`{"hr":72,"spo2":98}`),
	}
	event, err := wire.AppendCloudEvent(nil, "ward-3-east", epoch, "telemetry", 42, m, false, 0)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(block(t, "## CloudEvents", "json"), string(event)+"\n"); diff != "" {
		t.Error(diff)
	}
	gap := wire.Gap{
		Gateway: "ward-3-east", Epoch: epoch, Lane: "telemetry", Upstream: "cloud", First: 1001, Last: 1500, Count: 500,
		Bytes: 151000, FromMS: 1764000000000, ToMS: 1764000060000, Reason: "max_bytes",
	}
	state := wire.State{State: wire.StateOnline, Epoch: epoch, Version: "0.1.0", TS: 1764000000000}
	for section, v := range map[string]any{"## Gaps": gap, "## Birth and death": state} {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(block(t, section, "json"), string(b)+"\n"); diff != "" {
			t.Errorf("%s: %s", section, diff)
		}
	}
	at := wire.Time{Time: time.Date(2026, 1, 31, 16, 0, 2, 125e6, time.UTC)}
	step := wire.CommandEvent{
		Gateway: "ward-3-east", Device: "bed-07", ID: epoch, Name: "setpoint", State: "SUCCEEDED", Previous: "IN_PROGRESS", Final: true, At: at,
		ClockState: wire.ClockSynced, Attempts: 1, Source: "upstream cloud",
	}
	step.SetResult([]byte(`{"celsius":21.5}`), "application/json")
	presence := wire.DeviceEvent{
		Gateway: "ward-3-east", Device: "bed-07", State: wire.StateOffline, At: at, ClockState: wire.ClockSynced, Address: "10.0.0.7:50412",
		Protocol: "MQTT 3.1.1", Reason: "keep-alive ran out",
	}
	if diff := cmp.Diff(block(t, "## Command events", "json"), string(step.Encode())+"\n"); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(block(t, "## Device events", "json"), string(presence.Encode())+"\n"); diff != "" {
		t.Error(diff)
	}
	commands, err := os.ReadFile(filepath.Join("..", "..", "docs", "commands.md"))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(commands, append(step.Encode(), '\n')) {
		t.Error("docs/commands.md shows another event")
	}
	if got, err := wire.DecodeGap([]byte(block(t, "## Gaps", "json"))); err != nil || got != gap {
		t.Errorf("gap: %+v, %v", got, err)
	}
	if got, err := wire.DecodeState([]byte(block(t, "## Birth and death", "json"))); err != nil || got != state {
		t.Errorf("state: %+v, %v", got, err)
	}
}

// TestEveryKeyIsDocumented holds the tables of the page to the code: a key that is read is told of, with its limits in mind.
func TestEveryKeyIsDocumented(t *testing.T) {
	b, err := os.ReadFile(filepath.Join("..", "..", "docs", "commands.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), "\n## Submit\n")
	table, _, _ := strings.Cut(rest, "\n## ")
	for _, key := range wire.SubmitKeys {
		if !strings.Contains(table, "\n| `"+key+"` |") {
			t.Errorf("docs/commands.md does not tell of the key %s", key)
		}
	}
}
