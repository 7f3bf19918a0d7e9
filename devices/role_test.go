package devices_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"holdfast/devices"
	"holdfast/internal/mqtt"
)

func TestRolesAreChecked(t *testing.T) {
	for _, c := range []struct {
		r   devices.Role
		say string
	}{
		{devices.Role{}, "a name has"},
		{devices.Role{Name: "a b"}, "a name has"},
		{devices.Role{Name: "ä"}, "a name has"},
		{devices.Role{Name: "r", Publish: []string{""}}, `publish pattern "" is empty`},
		{devices.Role{Name: "r", Subscribe: []string{"a/#/b"}}, "only at the end"},
		{devices.Role{Name: "r", Publish: []string{"a#"}}, "no topic filter"},
		{devices.Role{Name: "r", Publish: []string{"a/b+/c"}}, "no topic filter"},
		{devices.Role{Name: "r", Publish: []string{"a/x{device}/c"}}, "{device} beside other characters"},
		{devices.Role{Name: "r", Publish: []string{"a/{id}"}}, "only {device}"},
		{devices.Role{Name: "r", Publish: []string{"a\x00"}}, "U+0000"},
		{devices.Role{Name: "r", Publish: []string{"\xff"}}, "UTF-8"},
		{devices.Role{Name: "r", Subscribe: []string{"$share/g/a"}}, "without $share"},
		{devices.Role{Name: "r", Limits: devices.Limits{BytesPerSecond: -1}}, "negative"},
	} {
		if err := c.r.Validate(); err == nil || !strings.Contains(err.Error(), c.say) {
			t.Errorf("%+v: %v, want an error that says %s", c.r, err, c.say)
		}
	}
	s := newSite(t)
	if err := s.SetPolicy([]devices.Role{{Name: "r"}, {Name: "r"}}, false); !errors.Is(err, devices.ErrInvalid) || !strings.Contains(err.Error(), "twice") {
		t.Errorf("a role twice: %v", err)
	}
	err := s.SetPolicy([]devices.Role{{Name: "x", Publish: []string{"#a"}}, {Name: "y", Publish: []string{"+b"}}}, true)
	if err == nil || !strings.Contains(err.Error(), `"x"`) || !strings.Contains(err.Error(), `"y"`) {
		t.Errorf("not all errors at once: %v", err)
	}
	if _, err := s.login("nobody", ""); !errors.Is(err, devices.ErrCredentials) {
		t.Errorf("a policy that is wrong was taken: %v", err)
	}
}

func TestWhatRolesAllow(t *testing.T) {
	s := newSite(t, anonymously, withRoles(
		devices.Role{Name: "own", Publish: []string{"{device}/+/x", "a/{device}", "+/b/#", "exact"}, Subscribe: []string{"a/+/{device}/#", "+/s", "dt/#"}},
		devices.Role{Name: "none"},
	))
	s.add(devices.NewDevice{ID: "d"})
	s.add(devices.NewDevice{ID: "own", Role: "own"})
	s.add(devices.NewDevice{ID: "none", Role: "none"})
	s.add(devices.NewDevice{ID: "mon", Role: devices.MonitorRole})
	s.add(devices.NewDevice{ID: "off", Disabled: true})
	for device, topics := range map[string]string{
		"d": "+dt/a/b +dt +alarm/x +local/x +telemetry/x +cmd/d/res/1/succeeded +cmd/d/res +twin/d/x +twin/d " +
			"-dta/x -data/x -cmd/d/req/1/x -cmd/e/res/1/succeeded -cmd/dd/res/1 -cmd/d -cmd/+/res/1 -twin/e/x -twin $SYS/x -/dt/a -x",
		"own":     "+own/a/x +own//x -own/a/b/x -own/a +a/own -a/own/b -a/x +q/b +q/b/c +/b -$q/b +exact -exact/a -exac",
		"none":    "-dt/a -x",
		"mon":     "-dt/a -x -cmd/mon/res/1/accepted",
		"off":     "-dt/a",
		"nobody":  "+dt/a +x/y +cmd +cmd/nobody/res/1/x +cmd/nobody/res -cmd/nobody -cmd/nobody/req/1/x -cmd/d/res/1/x -cmd/nobody2/res/x -cmd/ -$SYS/x -cmd/nobody/resx",
		"a/b":     "+dt/a -cmd/a/b/res/x -cmd/a/res/x",
		"+":       "+dt/a -cmd/x/res/1 -cmd/+/res/1",
		"hf-1234": "+dt/a +cmd/hf-1234/res/1/x",
	} {
		i := s.Identity(device)
		for _, topic := range strings.Fields(topics) {
			want := topic[0] == '+'
			topic = topic[1:]
			if got := i.MayPublish([]byte(topic)); got != want {
				t.Errorf("%s to %s: %v", device, topic, got)
			}
		}
		if i.MayPublish(nil) || i.MaySubscribe("") {
			t.Errorf("%s: the empty topic is allowed", device)
		}
	}
	for device, filters := range map[string]string{
		"d":      "+cmd/d/req/# +cmd/d/req/1/x +cmd/d/req +twin/d/# +twin/d/+/a -cmd/+/req/# -cmd/# -# -+/d/req/# -cmd/e/req/# -twin/+ -twin/# -dt/x",
		"own":    "+a/x/own/# +a/+/own/z +a/+/own -a/#  -a/+/+ +x/s ++/s -#/s -$x/s +dt/# +dt/+/x +dt -+ -+/#",
		"none":   "-x -#",
		"mon":    "+# +x ++/+ +cmd/+/req/# -$SYS/# -$SYS",
		"off":    "-cmd/off/req/#",
		"nobody": "+# +cmd/nobody/req/# -$SYS/#",
		"+":      "+#",
	} {
		i := s.Identity(device)
		for _, filter := range strings.Fields(filters) {
			want := filter[0] == '+'
			if got := i.MaySubscribe(filter[1:]); got != want {
				t.Errorf("%s subscribes to %s: %v", device, filter[1:], got)
			}
		}
	}
}

// TestIDsWidenNoPattern: an id is compared as it is, also one that looks like a wildcard.
func TestIDsWidenNoPattern(t *testing.T) {
	s := newSite(t, anonymously, withRoles(devices.Role{
		Name: devices.AnonymousRole, Publish: []string{"x/{device}/#", "{device}"}, Subscribe: []string{"cmd/{device}/req/#", "{device}"},
	}))
	for _, id := range []string{"+", "#", "a/b", "a/#", ""} {
		i := s.Identity(id)
		for _, text := range []string{"cmd/+/req/#", "cmd/a/req/#", "cmd/" + id + "/req/x", "x/a/b", "x/" + id + "/y", "a", id, "#", "+"} {
			if i.MaySubscribe(text) || i.MayPublish([]byte(text)) {
				t.Errorf("%q may use %q", id, text)
			}
		}
	}
	if i := s.Identity("fine"); !i.MaySubscribe("cmd/fine/req/#") || !i.MayPublish([]byte("x/fine")) {
		t.Error("a device may not use its own topics")
	}
}

func TestChangesOfRightsActAtOnce(t *testing.T) {
	s := newSite(t, withRoles(devices.Role{Name: "narrow", Publish: []string{"dt/x"}}))
	i := s.mustLogin("d", s.add(devices.NewDevice{ID: "d"}))
	may := func(when, topic string, want bool) {
		t.Helper()
		if got := i.MayPublish([]byte(topic)); got != want {
			t.Errorf("%s, publish to %s: %v", when, topic, got)
		}
	}
	patch := func(p devices.DevicePatch) {
		t.Helper()
		if _, err := s.Patch(t.Context(), "d", p); err != nil {
			t.Fatal(err)
		}
	}
	may("as a device", "dt/y", true)
	patch(devices.DevicePatch{Role: ptr("narrow")})
	may("narrow", "dt/y", false)
	may("narrow", "dt/x", true)
	patch(devices.DevicePatch{Enabled: ptr(false)})
	may("disabled", "dt/x", false)
	patch(devices.DevicePatch{Enabled: ptr(true)})
	may("enabled", "dt/x", true)
	if err := s.SetPolicy([]devices.Role{{Name: "narrow", Publish: []string{"dt/z"}}}, false); err != nil {
		t.Fatal(err)
	}
	may("another policy", "dt/x", false)
	may("another policy", "dt/z", true)
	if err := s.SetPolicy(nil, false); err != nil {
		t.Fatal(err)
	}
	may("no such role", "dt/z", false)
	_, err := s.login("d", "")
	wantErr(t, "login without anything", err, devices.ErrCredentials)
	if err := s.Remove(t.Context(), "d"); err != nil {
		t.Fatal(err)
	}
	may("removed", "dt/z", false)
	s.add(devices.NewDevice{ID: "d"})
	may("there again", "dt/z", true)
}

func TestADeviceWithoutARoleIsNotLetIn(t *testing.T) {
	s := newSite(t, withRoles(devices.Role{Name: "old"}))
	secret := s.add(devices.NewDevice{ID: "d", Role: "old"})
	s = s.restart()
	_, err := s.login("d", secret)
	if !errors.Is(err, devices.ErrDisabled) || !strings.Contains(err.Error(), `"old"`) {
		t.Errorf("login: %v", err)
	}
}

// levels of patterns, filters and topics for the properties below: few, so that they meet.
func drawLevels(wild ...string) *rapid.Generator[string] {
	level := rapid.SampledFrom(append([]string{"a", "b", "", "$x", "dev"}, wild...))
	return rapid.Custom(func(t *rapid.T) string {
		parts := rapid.SliceOfN(level, 1, 4).Draw(t, "levels")
		if len(wild) > 0 && rapid.Bool().Draw(t, "tree") {
			parts = append(parts, "#")
			if rapid.Bool().Draw(t, "root") {
				parts = parts[len(parts)-1:]
			}
		}
		return strings.Join(parts, "/")
	})
}

// TestCoversIsNeverWrong: what a filter that is allowed matches, is allowed by the rules of MQTT.
func TestCoversIsNeverWrong(t *testing.T) {
	yes := 0
	rapid.Check(t, func(t *rapid.T) {
		pattern := drawLevels("+", "{device}").Draw(t, "pattern")
		filter := drawLevels("+").Draw(t, "filter")
		own := rapid.SampledFrom([]string{"dev", "a", ""}).Draw(t, "own")
		topic := drawLevels().Draw(t, "topic")
		if checkCovers(t.Fatalf, pattern, filter, own, topic) {
			yes++
		}
	})
	if yes == 0 {
		t.Error("nothing was covered: the test shows nothing")
	}
}

// checkCovers returns whether pattern covers filter and filter matches topic.
func checkCovers(fail func(string, ...any), pattern, filter, own, topic string) bool {
	plain := strings.ReplaceAll(pattern, "{device}", own) // what the pattern means for this device
	if own == "" && plain != pattern {
		plain = "" // nothing
	}
	matches := plain != "" && mqtt.Match(plain, topic)
	if got := devices.PatternMatches(pattern, topic, own); got != matches && topic != "" {
		fail("pattern %q, device %q, topic %q: %v, MQTT says %v", pattern, own, topic, got, matches)
	}
	if topic != "" && devices.PatternCovers(pattern, topic, own) != matches {
		fail("pattern %q, device %q covers the topic %q: %v, and matches it: %v", pattern, own, topic, !matches, matches)
	}
	covers := devices.PatternCovers(pattern, filter, own)
	if covers && mqtt.Match(filter, topic) && !matches {
		fail("pattern %q, device %q covers %q, which matches %q, but it does not", pattern, own, filter, topic)
	}
	if devices.PatternCovers(pattern, pattern, own) != (plain == pattern) && mqtt.ValidFilter(pattern) && !strings.HasPrefix(pattern, "$share/") {
		fail("pattern %q, device %q covers itself: %v", pattern, own, plain != pattern)
	}
	return covers && mqtt.Match(filter, topic)
}

func FuzzPattern(f *testing.F) {
	f.Add("dt/#", "dt/+/x", "dev", "dt/a/x")
	f.Add("cmd/{device}/req/#", "cmd/+/req/#", "+", "cmd/a/req/1")
	f.Add("+/#", "#", "dev", "$SYS")
	f.Add("#", "$SYS/#", "", "$SYS/x")
	f.Fuzz(func(t *testing.T, pattern, filter, own, topic string) {
		r := devices.Role{Name: "r", Publish: []string{pattern}, Subscribe: []string{pattern}}
		valid := r.Validate() == nil
		if plain := strings.ReplaceAll(pattern, "{device}", "x"); valid && !mqtt.ValidFilter(plain) {
			t.Fatalf("pattern %q is allowed and no filter", pattern)
		}
		if !valid || !mqtt.ValidFilter(filter) || strings.HasPrefix(filter, "$share/") || !mqtt.ValidTopic(topic) {
			return
		}
		if devices.CheckID(own) != nil {
			own = ""
		}
		checkCovers(t.Fatalf, pattern, filter, own, topic)
	})
}

func FuzzID(f *testing.F) {
	for _, id := range []string{"", "pump-1", "a/b", "+", "\xff", "$x", "urn:dev:1", "-"} {
		f.Add(id)
	}
	f.Fuzz(func(t *testing.T, id string) {
		if err := devices.CheckID(id); err != nil {
			if !errors.Is(err, devices.ErrBadID) {
				t.Fatalf("%q: %v", id, err)
			}
			return
		}
		if topic := fmt.Sprintf("cmd/%s/req/1/x", id); !mqtt.ValidTopic(topic) || strings.Count(topic, "/") != 4 || len(id) > 128 {
			t.Fatalf("%q is a device id and no level of a topic", id)
		}
	})
}

func TestRightsAllocateNothing(t *testing.T) {
	s := newSite(t)
	i := s.mustLogin("d", s.add(devices.NewDevice{ID: "d"}))
	for _, topic := range [][]byte{[]byte("dt/app/d/temperature"), []byte("twin/d/reported"), []byte("not/allowed")} {
		name := string(topic)
		if n := testing.AllocsPerRun(100, func() {
			i.MayPublish(topic)
			i.MaySubscribe(name)
		}); n != 0 {
			t.Errorf("%s: %v allocations", topic, n)
		}
	}
}
