// Package config reads a gateway's one configuration file: strict, every problem at once and each
// with its place, defaults filled in.
package config

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"holdfast/bridge"
	"holdfast/devices"
	"holdfast/gateway/broker"
	"holdfast/spool"
)

// Config is what a file says, with defaults where it says nothing. Paths are absolute, or relative
// to the working directory if the file was named so.
type Config struct {
	Gateway   Gateway           `yaml:"gateway"`
	Listeners []broker.Listener `yaml:"listeners"`
	Devices   Devices           `yaml:"devices"`
	Spool     Spool             `yaml:"spool"`
	Routes    []Route           `yaml:"routes"`
	Upstreams []bridge.Config   `yaml:"upstreams"`
	HTTP      HTTP              `yaml:"http"`
	Log       Log               `yaml:"log"`
	Traces    Traces            `yaml:"traces"`
}

// Gateway is who this gateway is and where it keeps what it must not lose.
type Gateway struct {
	ID      string `yaml:"id"`       // part of every message id and of every topic upstream
	DataDir string `yaml:"data_dir"` // made with mode 0700 if it is not there
}

// Devices is who may connect, what they may do, and how commands get to them.
type Devices struct {
	Anonymous               bool           `yaml:"anonymous"`                  // any client id is a device
	AllowAnonymousOnNetwork bool           `yaml:"allow_anonymous_on_network"` // also on listeners that other machines reach
	Roles                   []devices.Role `yaml:"roles"`                      // besides the built-in ones, or instead of one of the same name
	Commands                Commands       `yaml:"commands"`
}

// Commands is how commands wait and are sent; see devices.QueueConfig.
type Commands struct {
	Window     int           `yaml:"window"`      // commands of one device that are under way at once
	AckTimeout time.Duration `yaml:"ack_timeout"` // from the PUBLISH to the device's PUBACK
	History    time.Duration `yaml:"history"`     // how long a command is kept after its end
	MaxPending int           `yaml:"max_pending"` // commands without an end, of all devices
}

// Spool is how messages are kept until every upstream has them.
type Spool struct {
	Durability   string             `yaml:"durability"`    // Fsync or Interval
	SyncInterval time.Duration      `yaml:"sync_interval"` // with Interval: the most that a power cut takes
	DiskReserve  int64              `yaml:"disk_reserve"`  // bytes of the file system that messages never use; 0: see kv.Reserve
	Lanes        []spool.LaneConfig `yaml:"lanes"`
}

// Values of Spool.Durability.
const (
	Fsync    = "fsync"
	Interval = "interval"
)

// Route sends topics to a lane. The first that matches wins.
type Route struct {
	Match string `yaml:"match"` // MQTT topic filter
	Lane  string `yaml:"lane"`  // name of a lane, or LaneNone
}

// LaneNone keeps a message local: it is handed to subscribers and not spooled.
const LaneNone = "none"

// DefaultLane takes what no route matches.
const DefaultLane = "telemetry"

// HTTP is the operators' door.
type HTTP struct {
	Address string `yaml:"address"` // host:port; "": no HTTP
}

// Log is how much is told and in which form.
type Log struct {
	Level  string `yaml:"level"`  // debug, info, warn, error
	Format string `yaml:"format"` // text, json, or auto: text on a terminal, else JSON
}

// Traces is whom to tell the way that messages take.
type Traces struct {
	Endpoint string `yaml:"endpoint"` // URL of a collector's OTLP over HTTP; "": nobody
	Every    int    `yaml:"every"`    // each so many messages of a lane
}

const (
	defaultDataDir  = "/var/lib/holdfast"
	loopbackDataDir = "holdfast-data"
	defaultLaneSize = 1 << 30
	defaultLaneAge  = 7 * 24 * time.Hour
	defaultPending  = 200_000
)

// Default is the configuration of a gateway without a file: what a newcomer's first minute needs,
// reachable from this machine only.
func Default() (*Config, error) {
	c := defaults()
	c.Gateway.DataDir = loopbackDataDir
	c.Devices.Anonymous = true
	c.fill()
	d := newDecoder("(default)")
	d.validate(c)
	if d.problems.fatal() {
		return nil, d.problems
	}
	return c, nil
}

// defaults is what a file starts from.
func defaults() *Config {
	return &Config{
		Gateway: Gateway{DataDir: defaultDataDir},
		Devices: Devices{Commands: Commands{
			Window: 1, AckTimeout: 30 * time.Second, History: 7 * 24 * time.Hour, MaxPending: defaultPending,
		}},
		Spool: Spool{
			Durability:   Fsync,
			SyncInterval: 100 * time.Millisecond,
		},
		HTTP: HTTP{Address: "127.0.0.1:8080"},
		Log:  Log{Level: "info", Format: "auto"},

		Traces: Traces{Every: 100},
	}
}

// entries is what an entry of a list starts from, by its type.
func entries() map[reflect.Type]reflect.Value {
	return map[reflect.Type]reflect.Value{
		reflect.TypeFor[spool.LaneConfig](): reflect.ValueOf(spool.LaneConfig{
			MaxBytes: defaultLaneSize, MaxAge: defaultLaneAge, WhenFull: spool.DropOldest,
			Drain: spool.InOrder, BackfillShare: spool.DefaultBackfillShare,
		}),
		reflect.TypeFor[bridge.Config](): reflect.ValueOf(bridge.Config{Format: bridge.FormatBatch, Window: bridge.DefaultWindow, Commands: true}),
	}
}

// fill gives what depends on other keys or on this machine its default.
func (c *Config) fill() {
	if c.Gateway.ID == "" {
		c.Gateway.ID = hostID()
	}
	if c.Listeners == nil {
		c.Listeners = []broker.Listener{{Name: "local", Protocol: "mqtt", Address: "127.0.0.1:1883"}}
	}
	if c.Spool.Lanes == nil {
		c.Spool.Lanes = []spool.LaneConfig{
			{Name: "alarm", Share: 50, MaxBytes: 256 << 20, MaxAge: 720 * time.Hour, WhenFull: spool.Reject},
			{Name: "telemetry", Share: 40, MaxBytes: 8 << 30, MaxAge: 168 * time.Hour, WhenFull: spool.DropOldest},
			{Name: "bulk", Share: 10, MaxBytes: 2 << 30, MaxAge: 72 * time.Hour, WhenFull: spool.DropOldest},
		}
		for i := range c.Spool.Lanes {
			c.Spool.Lanes[i].Drain, c.Spool.Lanes[i].BackfillShare = spool.InOrder, spool.DefaultBackfillShare
		}
	}
	if c.Routes == nil {
		c.Routes = []Route{}
		for _, l := range c.Spool.Lanes {
			if l.Name == "alarm" {
				c.Routes = append(c.Routes, Route{Match: "alarm/#", Lane: "alarm"})
			}
		}
		c.Routes = append(c.Routes, Route{Match: "local/#", Lane: LaneNone})
	}
	if c.Upstreams == nil {
		c.Upstreams = []bridge.Config{}
	}
	shareOut(c.Spool.Lanes)
}

// shareOut gives lanes without a share equal parts of what the others leave.
func shareOut(lanes []spool.LaneConfig) {
	left, without := 100, 0
	for _, l := range lanes {
		left -= max(0, l.Share)
		if l.Share == 0 {
			without++
		}
	}
	if without == 0 || left < without {
		return // nothing to do, or too little: validate says so
	}
	for i := range lanes {
		if lanes[i].Share == 0 {
			lanes[i].Share = left / without
		}
	}
}

// hostID makes the host name fit to be a gateway's id; a name that cannot be had is told by validate.
func hostID() string {
	host, err := os.Hostname()
	if err != nil {
		return ""
	}
	return strings.Trim(strings.Map(func(r rune) rune {
		if idRune(r) {
			return r
		}
		return '-'
	}, host), "-._")
}

// Load reads the file at path and checks it and the files it names. The warnings are what an
// operator should know although the gateway can run. The error is Problems if the file can be read
// but is not right.
func Load(path string) (c *Config, warnings Problems, err error) {
	data, err := readFile(path)
	if err != nil {
		return nil, nil, err
	}
	c, d := decode(path, data)
	if c != nil {
		d.checkFiles(c)
	}
	return d.result(c)
}

// Parse is Load for data that is at hand, without a look at the files it names. name stands in
// problems, and relative paths in data are taken from its folder.
func Parse(name string, data []byte) (c *Config, warnings Problems, err error) {
	c, d := decode(name, data)
	return d.result(c)
}

func (d *decoder) result(c *Config) (*Config, Problems, error) {
	d.problems.sort()
	if d.problems.fatal() {
		// Warnings about a file that is wrong are often about what is wrong: first things first.
		return nil, nil, slices.DeleteFunc(d.problems, func(p Problem) bool { return p.Warning })
	}
	return c, d.problems, nil
}

func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFileBytes+1))
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	return data, nil
}

// decode gives the configuration unless the file is not YAML at all, and a decoder that holds the
// problems found so far.
func decode(name string, data []byte) (*Config, *decoder) {
	d := newDecoder(name)
	d.elements = entries()
	doc, ok := d.parse(data)
	if !ok {
		return nil, d
	}
	c := defaults()
	if doc != nil {
		d.value(doc, "", reflect.ValueOf(c).Elem())
	}
	c.fill()
	c.resolve(filepath.Dir(name))
	d.validate(c)
	return c, d
}

// parse gives the one document of a file, nil if it is empty.
func (d *decoder) parse(data []byte) (doc *yaml.Node, ok bool) {
	defer func() {
		if p := recover(); p != nil { // the library says "internal error" of some input by a panic
			d.add(Problem{Text: "is not YAML that can be read"})
			doc, ok = nil, false
		}
	}()
	if len(data) > maxFileBytes {
		d.add(Problem{Text: fmt.Sprintf("is larger than %s: this is not a configuration", formatSize(maxFileBytes))})
		return nil, false
	}
	dec := yaml.NewDecoder(strings.NewReader(string(data)))
	var n yaml.Node
	switch err := dec.Decode(&n); {
	case errors.Is(err, io.EOF):
		return nil, true
	case err != nil:
		d.syntax(err)
		return nil, false
	}
	var second yaml.Node
	if err := dec.Decode(&second); !errors.Is(err, io.EOF) {
		p := Problem{Text: "holds more than one document: remove the second '---'"}
		if err != nil {
			p.Text = "is not YAML after the end of the first document: remove '---' and what follows"
		} else {
			p.Line, p.Column = second.Line, second.Column
		}
		d.add(p)
		return nil, false
	}
	if n.Kind != yaml.DocumentNode || len(n.Content) != 1 {
		return nil, true
	}
	return n.Content[0], true
}

// syntax reports what the library says, without the words it takes from the file: they may be a secret.
func (d *decoder) syntax(err error) {
	text := strings.TrimPrefix(err.Error(), "yaml: ")
	p := Problem{}
	if _, e := fmt.Sscanf(text, "line %d:", &p.Line); e == nil {
		_, text, _ = strings.Cut(text, ": ")
		p.Column = 1
	}
	if strings.HasPrefix(text, "unknown anchor") {
		text = "an alias (*name) has no anchor (&name) before it; a value that begins with * needs quotes"
	}
	p.Text = "is not YAML: " + text
	if strings.Contains(text, "cannot start any token") {
		p.Text += " (indent with spaces, not tabs; a value that begins with @, ` or % needs quotes)"
	}
	d.add(p)
}

// resolve makes paths that the file gives relative to itself, so that it means the same wherever
// the gateway is started.
func (c *Config) resolve(dir string) {
	for _, p := range c.paths() {
		if *p != "" && !filepath.IsAbs(*p) {
			*p = filepath.Join(dir, *p)
		}
	}
}

// Absolute gives a copy whose paths are absolute, so that it is the same whoever named its file, and how.
func (c *Config) Absolute() (*Config, error) {
	n := *c
	n.Listeners, n.Upstreams = slices.Clone(c.Listeners), slices.Clone(c.Upstreams)
	for _, p := range n.paths() {
		if *p == "" {
			continue
		}
		abs, err := filepath.Abs(*p)
		if err != nil {
			return nil, fmt.Errorf("path %s: %w", *p, err)
		}
		*p = abs
	}
	return &n, nil
}

func (c *Config) paths() []*string {
	ps := []*string{&c.Gateway.DataDir}
	for i := range c.Listeners {
		t := &c.Listeners[i].TLS
		ps = append(ps, &t.Cert, &t.Key, &t.ClientCA, &t.CRL)
	}
	for i := range c.Upstreams {
		u := &c.Upstreams[i]
		ps = append(ps, &u.PasswordFile, &u.TLS.CA, &u.TLS.Cert, &u.TLS.Key)
	}
	return ps
}
