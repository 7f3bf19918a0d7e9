package devices

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"
)

// deviceLevel stands in a role's pattern for the device's own id.
const deviceLevel = "{device}"

// MaxRoleName is how many bytes the name of a role has at most.
const MaxRoleName = 64

// builtinRoles are there unless a configured role of the same name replaces one.
//
// anonymous may publish what it likes but nothing to a command topic that is not its own (see ruleSet.ownCommands),
// which no pattern can say.
func builtinRoles() []Role {
	return []Role{
		{
			Name:      DefaultRole,
			Publish:   []string{"dt/#", "alarm/#", "local/#", "telemetry/#", "cmd/{device}/res/#", "twin/{device}/#"},
			Subscribe: []string{"cmd/{device}/req/#", "twin/{device}/#"},
		},
		{Name: AnonymousRole, Publish: []string{"#"}, Subscribe: []string{"#"}},
		{Name: MonitorRole, Subscribe: []string{"#"}},
	}
}

// Validate checks a configured role; its errors name everything that is wrong with it.
func (r *Role) Validate() error {
	var errs []error
	if r.Name == "" || len(r.Name) > MaxRoleName || strings.ContainsFunc(r.Name, func(c rune) bool {
		return c >= utf8.RuneSelf || !alphanumeric(byte(c)) && c != '-' && c != '_' && c != '.'
	}) {
		errs = append(errs, fmt.Errorf("role %q: a name has 1 to %d letters, digits, dots, - and _", r.Name, MaxRoleName))
	}
	for _, list := range []struct {
		name     string
		patterns []string
	}{{"publish", r.Publish}, {"subscribe", r.Subscribe}} {
		for _, p := range list.patterns {
			if err := CheckPattern(p); err != nil {
				errs = append(errs, fmt.Errorf("role %q: %s pattern %q %w", r.Name, list.name, p, err))
			}
		}
	}
	if l := r.Limits; l.ConnectsPerMinute < 0 || l.MessagesPerSecond < 0 || l.BytesPerSecond < 0 {
		errs = append(errs, fmt.Errorf("role %q: a limit is negative; 0 is none", r.Name))
	}
	return errors.Join(errs...)
}

// CheckPattern holds a role's pattern to the rules of topic filters (MQTT 5.0 §4.7.1) and of {device}. The error goes on where the
// pattern was named: "is empty: …".
func CheckPattern(p string) error {
	switch {
	case p == "":
		return errors.New(`is empty: write a topic filter, such as "dt/#" or "cmd/{device}/req/#"`)
	case len(p) > 65535:
		return errors.New("has more than 65535 bytes")
	case !utf8.ValidString(p) || strings.ContainsRune(p, 0):
		return errors.New("is no UTF-8 without U+0000")
	case strings.HasPrefix(p, "$share/"):
		return errors.New("is a shared subscription: write the filter without $share and the group, it holds for both")
	}
	levels := strings.Split(p, "/")
	for i, level := range levels {
		switch {
		case level == "+" || level == deviceLevel:
		case level == "#":
			if i != len(levels)-1 {
				return errNoFilter
			}
		case strings.ContainsAny(level, "+#"):
			return errNoFilter
		case strings.Contains(level, deviceLevel):
			return errors.New("has {device} beside other characters: it stands for one whole level, as in cmd/{device}/req/#")
		case strings.HasPrefix(level, "{") && strings.HasSuffix(level, "}"):
			return fmt.Errorf("has the level %s: only {device} stands for something", level)
		}
	}
	return nil
}

var errNoFilter = errors.New("is no topic filter: '+' stands for one whole level, '#' for all that follow and only at the end")

// compiledRole is a role made ready. It does not change.
type compiledRole struct {
	name               string
	publish, subscribe ruleSet
	limits             Limits
}

func compileRole(r Role) *compiledRole {
	return &compiledRole{name: r.Name, publish: compileRules(r.Publish), subscribe: compileRules(r.Subscribe), limits: r.Limits}
}

// policy is all roles and the anonymous rule at one time. It does not change.
type policy struct {
	roles     map[string]*compiledRole
	anonymous bool
}

// newPolicy makes a policy of the built-in roles and those configured.
func newPolicy(roles []Role, anonymous bool) (*policy, error) {
	p := &policy{roles: map[string]*compiledRole{}, anonymous: anonymous}
	var errs []error
	for i := range roles {
		err := roles[i].Validate()
		if err == nil && p.roles[roles[i].Name] != nil {
			err = fmt.Errorf("role %q is there twice", roles[i].Name)
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		p.roles[roles[i].Name] = compileRole(roles[i])
	}
	if len(errs) > 0 {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, errors.Join(errs...))
	}
	for _, r := range builtinRoles() {
		if p.roles[r.Name] == nil {
			c := compileRole(r)
			c.publish.ownCommands = r.Name == AnonymousRole
			p.roles[r.Name] = c
		}
	}
	return p, nil
}

// CheckRoles tells what SetPolicy would refuse.
func CheckRoles(roles []Role) error {
	_, err := newPolicy(roles, false)
	return err
}

// check says whether there is a role of this name.
func (p *policy) check(role string) error {
	if p.roles[role] != nil {
		return nil
	}
	names := make([]string, 0, len(p.roles))
	for name := range p.roles {
		names = append(names, name)
	}
	slices.Sort(names)
	return fmt.Errorf("%w: there is no role %q: there are %s; more are made under devices.roles", ErrInvalid, role, strings.Join(names, ", "))
}

// role is what a device in this state may do; nil: nothing.
func (p *policy) role(d *device) *compiledRole {
	switch {
	case d == nil:
		if p.anonymous {
			return p.roles[AnonymousRole]
		}
	case d.enabled && (p.anonymous || !d.anonymous):
		return p.roles[d.role]
	}
	return nil
}

// ruleSet is the patterns of one direction. Those of the form literal/# come first: they decide nearly every
// message with one comparison each.
type ruleSet struct {
	trees []string // "dt/" of dt/#
	rest  []pattern
	// ownCommands takes out what lies under cmd/, but for cmd/{device}/res/#: the built-in role anonymous.
	ownCommands bool
}

// pattern is a filter by its levels.
type pattern struct {
	levels []string // without a last #
	tree   bool     // it ends in #
}

func compileRules(patterns []string) ruleSet {
	var s ruleSet
	for _, p := range patterns {
		head, tree := strings.CutSuffix(p, "/#")
		switch {
		case p == "#":
			s.rest = append(s.rest, pattern{tree: true})
		case tree && !strings.ContainsAny(head, "+#") && !strings.Contains(head, deviceLevel):
			s.trees = append(s.trees, head+"/")
		default:
			s.rest = append(s.rest, pattern{levels: strings.Split(head, "/"), tree: tree})
		}
	}
	return s
}

// allowsTopic says whether topic, a valid one, matches a pattern. own is the device's id, "" for a client whose id is
// no device id: {device} then stands for nothing.
func (s *ruleSet) allowsTopic(topic []byte, own string) bool {
	if len(topic) == 0 {
		return false
	}
	for _, t := range s.trees {
		// "dt/…", and "dt" itself (MQTT 5.0 §4.7.1.2)
		if len(topic) >= len(t) && string(topic[:len(t)]) == t || len(topic) == len(t)-1 && string(topic) == t[:len(topic)] {
			return true
		}
	}
	for i := range s.rest {
		if s.rest[i].matches(topic, own) {
			return !s.ownCommands || !foreignCommand(topic, own)
		}
	}
	return false
}

var (
	commandTree = []byte("cmd/")
	answerLevel = []byte("/res")
)

// foreignCommand says whether topic lies under cmd/ but not under cmd/{own}/res.
func foreignCommand(topic []byte, own string) bool {
	rest, ok := bytes.CutPrefix(topic, commandTree)
	if !ok {
		return false
	}
	if own == "" || len(rest) < len(own) || string(rest[:len(own)]) != own {
		return true
	}
	rest, ok = bytes.CutPrefix(rest[len(own):], answerLevel)
	return !ok || len(rest) > 0 && rest[0] != '/'
}

// matches says whether topic, which is not empty, falls under p.
func (p *pattern) matches(topic []byte, own string) bool {
	more := true // topic has levels left, the next of which may be empty
	for i, level := range p.levels {
		if !more {
			return false
		}
		n := 0
		for n < len(topic) && topic[n] != '/' {
			n++
		}
		switch level {
		case "+":
			if i == 0 && n > 0 && topic[0] == '$' { // MQTT-4.7.2-1
				return false
			}
		case deviceLevel:
			if own == "" || string(topic[:n]) != own {
				return false
			}
		default:
			if string(topic[:n]) != level {
				return false
			}
		}
		if more = n < len(topic); more {
			topic = topic[n+1:]
		}
	}
	if len(p.levels) == 0 { // the pattern is #
		return topic[0] != '$'
	}
	return p.tree || !more
}

// allowsFilter says whether a pattern covers filter, a valid one without $share: every topic that filter matches,
// the pattern matches too. A topic is a filter that matches itself.
func (s *ruleSet) allowsFilter(filter, own string) bool {
	if filter == "" {
		return false
	}
	for _, t := range s.trees {
		if strings.HasPrefix(filter, t) || len(filter) == len(t)-1 && filter == t[:len(filter)] {
			return true
		}
	}
	for i := range s.rest {
		if s.rest[i].covers(filter, own) {
			return true
		}
	}
	return false
}

// covers compares level by level: # covers whatever follows, + any one level but #, a literal itself. It never says
// yes wrongly. It says no to filters that only the sum of several patterns covers, or "+/#" the filter "#".
func (p *pattern) covers(filter, own string) bool {
	rest, more := filter, true
	for i, level := range p.levels {
		if !more {
			return false
		}
		var name string
		name, rest, more = strings.Cut(rest, "/")
		switch {
		case name == "#":
			return false
		case level == "+":
			if i == 0 && strings.HasPrefix(name, "$") { // MQTT-4.7.2-1
				return false
			}
		case level == deviceLevel:
			if own == "" || name != own { // own is a device id: it is no wildcard
				return false
			}
		case name != level: // + in filter, too
			return false
		}
	}
	switch {
	case len(p.levels) == 0:
		return filter[0] != '$'
	case p.tree:
		return true
	default:
		return !more
	}
}
