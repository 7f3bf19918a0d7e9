package config

import (
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"holdfast/bridge"
	"holdfast/devices"
	"holdfast/gateway/broker"
	"holdfast/internal/mqtt"
	"holdfast/spool"
)

// Limits of what a file may say.
const (
	maxLanes  = 16
	maxWindow = 16_384 // the bridge's own limit, well below the 65,535 packet ids
	minLane   = 1 << 20

	maxConnections = 1_000_000 // more than one machine has ports and memory for: a slip of the pen
	maxRoles       = 64
	maxPatterns    = 64 // of one role; every publish may be held against all of them
	maxCmdWindow   = 16
	maxPending     = 1_000_000
)

const (
	minAckTimeout, maxAckTimeout = time.Second, 10 * time.Minute
	minHistory, maxHistory       = time.Minute, 365 * 24 * time.Hour
)

// problem reports what is wrong with the value of a key, at its place or that of the nearest
// section above it that the file has.
func (d *decoder) problem(path, format string, args ...any) {
	d.report(false, path, format, args...)
}

func (d *decoder) warn(path, format string, args ...any) {
	d.report(true, path, format, args...)
}

func (d *decoder) report(warning bool, path, format string, args ...any) {
	p := Problem{Key: path, Text: fmt.Sprintf(format, args...), Warning: warning}
	for at := path; ; {
		if pl, ok := d.places[at]; ok && at != "" {
			p.Line, p.Column = pl.line, pl.column
			break
		}
		cut := strings.LastIndexAny(at, ".[")
		if cut < 0 {
			break
		}
		at = at[:cut]
	}
	// What a value that could not be read leads to is no news.
	if !slices.ContainsFunc(d.problems, func(q Problem) bool { return q.Key == path && !q.Warning }) {
		d.add(p)
	}
}

// has tells whether the file gives the key.
func (d *decoder) has(path string) bool {
	_, ok := d.places[path]
	return ok
}

// oneOf checks a value against the few that there are.
func (d *decoder) oneOf(path, value string, allowed ...string) bool {
	if slices.Contains(allowed, value) {
		return true
	}
	hint := "has to be one of " + strings.Join(allowed, ", ")
	if value == "" {
		d.problem(path, "is missing: %s", hint)
		return false
	}
	if near := Nearest(value, allowed); near != "" {
		hint = fmt.Sprintf("did you mean %q? It %s", near, hint)
	}
	d.problem(path, "%s%s", separate(show(path, value)), hint)
	return false
}

// separate turns what show gives into the start of a sentence.
func separate(shown string) string {
	if shown == "" {
		return ""
	}
	return "is " + strings.TrimSuffix(shown, " ") + ": "
}

// validate checks what each value means and how they fit together. It needs no other file.
func (d *decoder) validate(c *Config) {
	d.checkGateway(c)
	d.checkListeners(c)
	d.checkDevices(&c.Devices)
	d.checkSpool(c)
	d.checkRoutes(c)
	d.checkUpstreams(c)
	d.oneOf("log.level", c.Log.Level, "debug", "info", "warn", "error")
	d.checkTraces(&c.Traces)
	d.oneOf("log.format", c.Log.Format, "auto", "text", "json")
}

func idRune(r rune) bool {
	return 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || r == '-' || r == '_' || r == '.'
}

// validName tells whether s can stand in topics, message ids, metrics and file names as it is.
func validName(s string, most int) bool {
	return s != "" && len(s) <= most && !strings.ContainsFunc(s, func(r rune) bool { return !idRune(r) }) &&
		s[0] != '.' && s[0] != '-'
}

func (d *decoder) name(path, value string, most int) bool {
	if value == "" {
		d.problem(path, "is missing: give it a name")
		return false
	}
	if !validName(value, most) {
		d.problem(path, "%shas to be 1 to %d letters, digits, '-', '_' or '.', and begin with a letter or digit",
			show(path, value), most)
		return false
	}
	return true
}

// unique reports the second use of a name within a list.
func (d *decoder) unique(path, value string, seen map[string]string) {
	if first, ok := seen[value]; ok {
		d.problem(path, "%sis the name of %s already", show(path, value), first)
		return
	}
	seen[value] = path[:strings.LastIndexByte(path, '.')]
}

func (d *decoder) checkGateway(c *Config) {
	if c.Gateway.ID == "" {
		d.problem("gateway.id", "this machine has no host name that could be the gateway's id: write one")
	} else {
		d.name("gateway.id", c.Gateway.ID, 64)
	}
	if c.Gateway.DataDir == "" {
		d.problem("gateway.data_dir", "is empty: write the folder where messages are kept, such as %s", defaultDataDir)
	}
}

// hostPort checks an address to listen on.
func (d *decoder) hostPort(path, value string) (host string, port int, ok bool) {
	if value == "" {
		d.problem(path, "is missing: write host:port, such as 127.0.0.1:1883 or 0.0.0.0:8883")
		return "", 0, false
	}
	host, p, err := net.SplitHostPort(value)
	if err == nil {
		port, err = strconv.Atoi(p)
	}
	if err != nil || port < 0 || port > 65535 || strings.ContainsAny(host, " /@") {
		d.problem(path, "%shas to be host:port, such as 127.0.0.1:1883, [::1]:1883 or 0.0.0.0:8883 (all addresses)",
			show(path, value))
		return "", 0, false
	}
	return host, port, true
}

// Loopback tells whether only this machine reaches an address that is listened on.
func Loopback(address string) bool {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return false
	}
	return loopbackHost(host)
}

func loopbackHost(host string) bool {
	if strings.EqualFold(host, "localhost") {
		return true
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.Unmap().IsLoopback()
}

type bound struct {
	host, path string
	port       int
}

// collides tells whether the two cannot be listened on at once.
func (b bound) collides(o bound) bool {
	any := func(h string) bool {
		ip, err := netip.ParseAddr(h)
		return h == "" || err == nil && ip.IsUnspecified()
	}
	local := func(h string) string {
		if strings.EqualFold(h, "localhost") {
			return "127.0.0.1"
		}
		return h
	}
	return b.port == o.port && b.port != 0 &&
		(any(b.host) || any(o.host) || strings.EqualFold(local(b.host), local(o.host)))
}

func (d *decoder) checkListeners(c *Config) {
	if len(c.Listeners) == 0 {
		d.problem("listeners", "has no entry: devices need at least one; remove the key for one on 127.0.0.1:1883")
	}
	names := map[string]string{}
	var taken []bound
	for i := range c.Listeners {
		l := &c.Listeners[i]
		path := fmt.Sprintf("listeners[%d]", i)
		if d.name(path+".name", l.Name, 32) {
			d.unique(path+".name", l.Name, names)
		}
		if l.MaxConnections < 0 || l.MaxConnections > maxConnections {
			d.problem(path+".max_connections", "has to be 0 to %d; 0 means no limit of its own", maxConnections)
		}
		known := d.oneOf(path+".protocol", l.Protocol, "mqtt", "mqtts", "ws", "wss")
		secure := l.Protocol == "mqtts" || l.Protocol == "wss"
		d.checkListenerTLS(path+".tls", l, known, secure)
		host, port, ok := d.hostPort(path+".address", l.Address)
		if !ok {
			continue
		}
		taken = d.take(taken, bound{host, path + ".address", port}, l.Address)
		if loopbackHost(host) {
			continue
		}
		switch {
		case c.Devices.Anonymous && !c.Devices.AllowAnonymousOnNetwork:
			d.problem(path+".address", "%sis reached by other machines, and devices.anonymous lets everybody in: listen "+
				"on 127.0.0.1, or set devices.anonymous to false, or devices.allow_anonymous_on_network to true if the "+
				"network itself keeps strangers out", show(path, l.Address))
		case known && !secure:
			d.warn(path+".protocol", "%s on %s is not encrypted: others on the network can read and change what devices "+
				"send, their secrets too; %s is the encrypted one", l.Protocol, l.Address, l.Protocol+"s")
		}
	}
	if c.HTTP.Address != "" {
		if host, port, ok := d.hostPort("http.address", c.HTTP.Address); ok {
			d.take(taken, bound{host, "http.address", port}, c.HTTP.Address)
			if !loopbackHost(host) {
				d.warn("http.address", "%s is reached by other machines, and HTTP is not encrypted: whoever listens on the way "+
					"reads the tokens; listen on 127.0.0.1 and put a reverse proxy with TLS before it, or come through "+
					"ssh -L %d:127.0.0.1:%d", c.HTTP.Address, port, port)
			}
		}
	}
}

func (d *decoder) checkTraces(t *Traces) {
	if t.Every < 1 {
		d.problem("traces.every", "is %d: 1 tells of every message, 100 of one in a hundred", t.Every)
	}
	if t.Endpoint == "" {
		return
	}
	u, err := url.Parse(t.Endpoint)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.User != nil {
		d.problem("traces.endpoint", "is no URL that begins with http:// or https:// and names a host, without user and password: "+
			"a collector on this machine has http://127.0.0.1:4318/v1/traces")
	}
}

func (d *decoder) take(taken []bound, b bound, address string) []bound {
	for _, t := range taken {
		if b.collides(t) {
			d.problem(b.path, "%sis taken by %s already: two cannot listen on one address", show(b.path, address), t.path)
			return taken
		}
	}
	return append(taken, b)
}

func (d *decoder) checkListenerTLS(path string, l *broker.Listener, known, secure bool) {
	t := &l.TLS
	switch {
	case !known:
	case secure:
		if t.Cert == "" {
			d.problem(path+".cert", "is missing: %s needs a certificate (PEM, with its chain)", l.Protocol)
		}
		if t.Key == "" {
			d.problem(path+".key", "is missing: %s needs the private key of the certificate (PEM)", l.Protocol)
		}
	case d.has(path) && (t.Cert != "" || t.Key != "" || t.ClientCA != "" || t.RequireClientCert || t.CRL != ""):
		d.problem(path, "is given for protocol %s, which is not encrypted: write protocol %ss, or remove tls", l.Protocol, l.Protocol)
	}
	if t.RequireClientCert && t.ClientCA == "" {
		d.problem(path+".require_client_cert", "needs client_ca: the certificates that devices' certificates are checked with")
	}
	if t.CRL != "" && t.ClientCA == "" {
		d.problem(path+".crl", "needs client_ca: it lists which of the certificates that client_ca signed are revoked")
	}
}

func (d *decoder) checkDevices(dev *Devices) {
	if dev.AllowAnonymousOnNetwork && !dev.Anonymous {
		d.warn("devices.allow_anonymous_on_network", "has no effect while devices.anonymous is false")
	}
	if len(dev.Roles) > maxRoles {
		d.problem("devices.roles", "has %d entries, at most %d are taken: roles are kinds of devices, {device} tells them apart",
			len(dev.Roles), maxRoles)
	}
	names := map[string]string{}
	for i := range dev.Roles {
		r := &dev.Roles[i]
		path := fmt.Sprintf("devices.roles[%d]", i)
		if d.name(path+".name", r.Name, devices.MaxRoleName) {
			d.unique(path+".name", r.Name, names)
		}
		d.patterns(path+".publish", r.Publish, true)
		d.patterns(path+".subscribe", r.Subscribe, false)
		for _, l := range []struct {
			key   string
			value int64
		}{
			{"connects_per_minute", int64(r.Limits.ConnectsPerMinute)},
			{"messages_per_second", int64(r.Limits.MessagesPerSecond)},
			{"bytes_per_second", r.Limits.BytesPerSecond},
		} {
			if l.value < 0 {
				d.problem(path+".limits."+l.key, "is less than nothing; 0 means no limit")
			}
		}
	}
	c := &dev.Commands
	if c.Window < 1 || c.Window > maxCmdWindow {
		d.problem("devices.commands.window", "has to be 1 to %d: the commands of one device that are under way at once", maxCmdWindow)
	}
	d.within("devices.commands.ack_timeout", c.AckTimeout, minAckTimeout, maxAckTimeout, "it is how long a device may take to acknowledge a command")
	d.within("devices.commands.history", c.History, minHistory, maxHistory, "it is how long a command can be looked at after its end")
	if c.MaxPending < 1 || c.MaxPending > maxPending {
		d.problem("devices.commands.max_pending", "has to be 1 to %d: the commands of all devices that have no end yet", maxPending)
	}
}

func (d *decoder) within(path string, value, least, most time.Duration, what string) {
	if value < least || value > most {
		d.problem(path, "%sis outside of %s to %s: %s", showDuration(value), formatDuration(least), formatDuration(most), what)
	}
}

// patterns checks what a role may publish to or subscribe to.
func (d *decoder) patterns(path string, list []string, publish bool) {
	if len(list) > maxPatterns {
		d.problem(path, "has %d entries, at most %d are taken", len(list), maxPatterns)
	}
	for i, p := range list {
		at := fmt.Sprintf("%s[%d]", path, i)
		if err := devices.CheckPattern(p); err != nil {
			d.problem(at, "%s%v", show(at, p), err)
		} else if publish && reserved(strings.Split(p, "/")) {
			d.warn(at, "%shas no effect: no device may publish there, only Holdfast itself does", show(at, p))
		}
	}
}

// reserved tells whether the pattern is about nothing but topics that Holdfast keeps for itself.
func reserved(levels []string) bool {
	return strings.HasPrefix(levels[0], "$") || levels[0] == "gw" || len(levels) > 2 && levels[0] == "cmd" && levels[2] == "req"
}

func (d *decoder) checkSpool(c *Config) {
	s := &c.Spool
	d.oneOf("spool.durability", s.Durability, Fsync, Interval)
	if s.SyncInterval < time.Millisecond || s.SyncInterval > time.Minute {
		d.problem("spool.sync_interval", "%sis outside of 1ms to 1m: it is what a power cut may take", showDuration(s.SyncInterval))
	}
	if s.Durability == Interval {
		d.warn("spool.durability", "interval: a power cut takes what was acknowledged in the last %s", formatDuration(s.SyncInterval))
	}
	if len(s.Lanes) == 0 {
		d.problem("spool.lanes", "has no entry: write at least one lane, or remove the key for alarm, telemetry and bulk")
	}
	if len(s.Lanes) > maxLanes {
		d.problem("spool.lanes", "has %d entries, at most %d are taken: lanes are classes of priority, not groups of devices",
			len(s.Lanes), maxLanes)
	}
	names := map[string]string{}
	sum := 0
	for i := range s.Lanes {
		l := &s.Lanes[i]
		path := fmt.Sprintf("spool.lanes[%d]", i)
		if d.name(path+".name", l.Name, 32) {
			if l.Name == LaneNone || l.Name == spool.SystemLane {
				d.problem(path+".name", "%q is reserved: choose another name", l.Name)
			} else {
				d.unique(path+".name", l.Name, names)
			}
		}
		switch {
		case l.Share == 0 && d.has(path+".share"):
			d.problem(path+".share", "has to be 1 to 100: the percentage of the link that the lane gets at least")
		case l.Share == 0:
			d.problem(path+".share", "is missing, and the other lanes leave nothing of the 100 percent: lower theirs")
		case l.Share < 0 || l.Share > 100:
			d.problem(path+".share", "has to be 1 to 100: the percentage of the link that the lane gets at least")
		default:
			sum += l.Share
		}
		if l.MaxBytes != 0 && l.MaxBytes < minLane {
			d.problem(path+".max_bytes", "%q is less than %s; 0 means no limit", formatSize(l.MaxBytes), formatSize(minLane))
		}
		if l.MaxAge != 0 && l.MaxAge < time.Second {
			d.problem(path+".max_age", "%sis less than 1s; 0 means no limit", showDuration(l.MaxAge))
		}
		d.oneOf(path+".when_full", string(l.WhenFull), string(spool.DropOldest), string(spool.Reject))
		d.oneOf(path+".drain", string(l.Drain), string(spool.InOrder), string(spool.LiveFirst))
		if l.BackfillShare < 1 || l.BackfillShare > 90 {
			d.problem(path+".backfill_share", "has to be 1 to 90: the percentage of the lane's bytes that a backlog gets while newer messages flow")
		}
	}
	if sum > 100 {
		d.problem("spool.lanes", "the shares add up to %d percent: at most 100 can be promised", sum)
	}
}

func showDuration(t time.Duration) string { return strconv.Quote(formatDuration(t)) + " " }

func (c *Config) hasLane(name string) bool {
	return slices.ContainsFunc(c.Spool.Lanes, func(l spool.LaneConfig) bool { return l.Name == name })
}

func (c *Config) laneNames() []string {
	var names []string
	for _, l := range c.Spool.Lanes {
		names = append(names, l.Name)
	}
	return names
}

func (d *decoder) checkRoutes(c *Config) {
	all := false
	for i, r := range c.Routes {
		path := fmt.Sprintf("routes[%d]", i)
		switch {
		case r.Match == "":
			d.problem(path+".match", `is missing: write a topic filter, such as "alarm/#" or "dt/+/+/temperature"`)
		case strings.HasPrefix(r.Match, "$share/"):
			d.problem(path+".match", "%sis a shared subscription: write the filter without $share and the group", show(path, r.Match))
		case !mqtt.ValidFilter(r.Match):
			d.problem(path+".match", "%sis no topic filter: '+' stands for one whole level, '#' for all that follow and only at the end",
				show(path, r.Match))
		default:
			for j, before := range c.Routes[:i] {
				if covers(before.Match, r.Match) {
					d.warn(path+".match", "%snever matches: routes[%d] comes first and takes it all", show(path, r.Match), j)
					break
				}
			}
			all = all || r.Match == "#"
		}
		d.lane(c, path+".lane", r.Lane, LaneNone)
	}
	if !all && !c.hasLane(DefaultLane) && len(c.Spool.Lanes) > 0 {
		d.problem("routes", "messages that no route matches go to the lane %s, which spool.lanes does not have: name a lane so, "+
			`or end the routes with { match: "#", lane: … }`, DefaultLane)
	}
}

func (d *decoder) lane(c *Config, path, name string, also ...string) bool {
	allowed := append(c.laneNames(), also...)
	switch {
	case slices.Contains(allowed, name):
		return true
	case name == "":
		d.problem(path, "is missing: write one of %s", strings.Join(allowed, ", "))
	default:
		hint := ""
		if near := Nearest(name, allowed); near != "" {
			hint = fmt.Sprintf("did you mean %q? ", near)
		}
		d.problem(path, "there is no lane %s: %sspool.lanes has %s", strings.TrimSuffix(show(path, name), " "), hint,
			strings.Join(allowed, ", "))
	}
	return false
}

// covers tells whether every topic that b matches is matched by a.
func covers(a, b string) bool {
	as, bs := strings.Split(a, "/"), strings.Split(b, "/")
	if strings.HasPrefix(b, "$") && (as[0] == "+" || as[0] == "#") {
		return false // wildcards do not match a leading $ (MQTT 5.0 §4.7.2)
	}
	for i, l := range as {
		switch {
		case l == "#":
			return true
		case i >= len(bs) || bs[i] == "#":
			return false
		case l == "+":
		case l != bs[i]:
			return false
		}
	}
	return len(as) == len(bs)
}

func (d *decoder) checkUpstreams(c *Config) {
	names := map[string]string{}
	served := map[string]bool{}
	for i := range c.Upstreams {
		u := &c.Upstreams[i]
		path := fmt.Sprintf("upstreams[%d]", i)
		if d.name(path+".name", u.Name, 64) {
			d.unique(path+".name", u.Name, names)
		}
		d.checkURLs(c, path, u)
		d.checkBudget(path+".budget", &u.Budget)
		if d.oneOf(path+".format", u.Format, bridge.FormatBatch, bridge.FormatPassthrough, bridge.FormatCloudEvents) && u.TopicPrefix != "" {
			switch {
			case u.Format != bridge.FormatPassthrough:
				d.problem(path+".topic_prefix", "is for format passthrough only: remove it, or change the format")
			case !mqtt.ValidTopic(u.TopicPrefix):
				d.problem(path+".topic_prefix", "%scannot begin a topic: no '+', '#' or zero character", show(path, u.TopicPrefix))
			}
		}
		if u.PasswordFile != "" && u.Username == "" {
			d.problem(path+".password_file", "needs a username: MQTT 3.1.1 has no password without one")
		}
		if u.Window < 1 || u.Window > maxWindow {
			d.problem(path+".window", "has to be 1 to %d: the sends that may wait for their acknowledgement", maxWindow)
		}
		if u.Lanes != nil && len(u.Lanes) == 0 {
			d.problem(path+".lanes", "has no entry: write lanes, or remove the key for all")
		}
		seen := map[string]bool{}
		for j, l := range u.Lanes {
			at := fmt.Sprintf("%s.lanes[%d]", path, j)
			if l == spool.SystemLane {
				d.problem(at, "the lane system goes to every upstream by itself: remove it")
				continue
			}
			if d.lane(c, at, l) && seen[l] {
				d.problem(at, "%sis given twice: remove one", show(at, l))
			}
			seen[l], served[l] = true, true
		}
		if u.Lanes == nil {
			for _, l := range c.laneNames() {
				served[l] = true
			}
		}
	}
	if len(c.Upstreams) == 0 {
		return
	}
	for i, l := range c.Spool.Lanes {
		if !served[l.Name] {
			d.warn(fmt.Sprintf("spool.lanes[%d].name", i), "lane %q goes to no upstream: its messages stay until max_age or max_bytes", l.Name)
		}
	}
}

func (d *decoder) checkURLs(c *Config, path string, u *bridge.Config) {
	schemes := map[string]bool{}
	switch {
	case u.URL != "" && u.URLs != nil:
		d.problem(path+".urls", "stands beside url: write url for one address, urls for several, not both")
		return
	case u.URLs == nil:
		schemes[d.checkURL(c, path+".url", u.URL)] = true
	case len(u.URLs) == 0:
		d.problem(path+".urls", "has no entry: write addresses, or url with one")
	}
	seen := map[string]bool{}
	for i, raw := range u.URLs {
		at := fmt.Sprintf("%s.urls[%d]", path, i)
		if raw != "" && seen[raw] {
			d.problem(at, "is given twice: remove one")
			continue
		}
		seen[raw] = true
		schemes[d.checkURL(c, at, raw)] = true
	}
	t := &u.TLS
	switch {
	case schemes["mqtt"] && schemes["mqtts"]:
		d.problem(path+".urls", "mixes mqtt:// and mqtts://: whoever blocks the encrypted ones would have everything in clear; write one of the two")
	case schemes["mqtt"] && (t.CA != "" || t.Cert != "" || t.Key != ""):
		d.problem(path+".tls", "is given, but the url begins with mqtt://, which is not encrypted: write mqtts://, or remove tls")
	}
	if t.Cert != "" && t.Key == "" {
		d.problem(path+".tls.key", "is missing: a certificate needs its private key")
	}
	if t.Key != "" && t.Cert == "" {
		d.problem(path+".tls.cert", "is missing: a private key needs its certificate")
	}
}

// checkURL returns the scheme of a good one, or "".
func (d *decoder) checkURL(c *Config, at, raw string) string {
	const forms = "write mqtts://host:8883 or mqtt://host:1883"
	if raw == "" {
		d.problem(at, "is missing: %s", forms)
		return ""
	}
	p, err := url.Parse(raw)
	if err != nil || p.Opaque != "" || p.Scheme == "" {
		d.problem(at, "is not a URL: %s", forms)
		return ""
	}
	switch p.Scheme {
	case "mqtt", "mqtts":
	case "nats", "kafka", "https":
		d.problem(at, "%s upstreams are not in this version: %s", p.Scheme, forms)
		return ""
	case "tcp", "ssl", "tls", "ws", "wss", "http":
		d.problem(at, "scheme %s is not taken: %s", p.Scheme, forms)
		return ""
	default:
		d.problem(at, "has an unknown scheme: %s", forms)
		return ""
	}
	port := p.Port()
	n, err := strconv.Atoi(port)
	switch {
	case p.Hostname() == "":
		d.problem(at, "has no host: %s", forms)
		return ""
	case p.User != nil:
		d.problem(at, "holds a user name or password: use username and password_file, a URL ends up in logs")
		return ""
	case p.Path != "" && p.Path != "/" || p.RawQuery != "" || p.Fragment != "":
		d.problem(at, "has something after the port: %s", forms)
		return ""
	case port != "" && (err != nil || n < 1 || n > 65535):
		d.problem(at, "has a port that is not 1 to 65535: %s", forms)
		return ""
	}
	if p.Scheme == "mqtt" {
		if !loopbackHost(p.Hostname()) {
			d.warn(at, "mqtt:// is not encrypted: others on the way can read and change what is sent, the password too; mqtts:// is the encrypted one")
		}
		if port == "" {
			n = 1883
		}
		d.checkLoop(c, at, bound{host: p.Hostname(), port: n})
	}
	return p.Scheme
}

func (d *decoder) checkBudget(path string, b *bridge.Budget) {
	err := b.Validate()
	if err == nil {
		return
	}
	for line := range strings.SplitSeq(err.Error(), "\n") {
		key, text, _ := strings.Cut(line, ": ")
		d.problem(path+"."+key, "%s", text)
	}
}

// checkLoop refuses an upstream that is this gateway: every message would come back for ever.
func (d *decoder) checkLoop(c *Config, path string, up bound) {
	if !loopbackHost(up.host) {
		return
	}
	for i, l := range c.Listeners {
		host, port, err := net.SplitHostPort(l.Address)
		if err != nil {
			continue
		}
		n, _ := strconv.Atoi(port)
		if (bound{host: host, port: n}).collides(up) {
			d.problem(path, "is listeners[%d] of this gateway: every message would come back to it", i)
		}
	}
}
