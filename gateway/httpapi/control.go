package httpapi

import (
	"net/http"
	"slices"
	"strings"
	"time"

	"holdfast/devices"
)

func (s *Server) reload(c *call) error {
	r, err := s.p.Control.ReloadFile()
	if err != nil {
		return err
	}
	c.object, c.detail = r.File, r.Summary()
	return c.reply(http.StatusOK, r)
}

func (s *Server) diffFile(c *call) error {
	r, err := s.p.Control.ConfigDiff()
	if err != nil {
		return err
	}
	return c.reply(http.StatusOK, r)
}

func (s *Server) diffConfig(c *call) error {
	var b ConfigFile
	if err := c.decode(&b); err != nil {
		return err
	}
	if !strings.HasPrefix(b.Name, "/") {
		return failf(codeBadBody, "name is %.200q: it has to be an absolute path", b.Name)
	}
	r, err := s.p.Control.DiffText(b.Name, []byte(b.Text))
	if err != nil {
		return err
	}
	return c.reply(http.StatusOK, r)
}

func (s *Server) getLog(c *call) error {
	return c.reply(http.StatusOK, LogLevel{s.p.Control.LogLevel()})
}

// levels are those that a log may have.
var levels = []string{"debug", "info", "warn", "error"}

func (s *Server) setLog(c *call) error {
	var b LogLevel
	if err := c.decode(&b); err != nil {
		return err
	}
	if !slices.Contains(levels, b.Level) {
		return failf(codeBadBody, "level is %.64q: it may be %s", b.Level, strings.Join(levels, ", "))
	}
	c.object = b.Level
	if err := s.p.Control.SetLogLevel(b.Level); err != nil {
		return err
	}
	return s.getLog(c)
}

func (s *Server) getDebug(c *call) error {
	id := c.path("id")
	if err := devices.CheckID(id); err != nil {
		return err
	}
	until := s.p.Control.DebugUntil(id)
	return c.reply(http.StatusOK, DeviceDebug{Device: id, Debug: !until.IsZero(), Until: until})
}

func (s *Server) debugDevice(c *call) error {
	var b DebugRequest
	if err := c.decode(&b); err != nil {
		return err
	}
	id := c.path("id")
	if err := devices.CheckID(id); err != nil {
		return err
	}
	d, err := time.ParseDuration(b.For)
	if err != nil || d < 0 {
		return failf(codeBadBody, "for is %.64q: it has to be a duration such as 10m; 0s ends it", b.For)
	}
	c.detail = d.String()
	until, err := s.p.Control.DebugDevice(id, d)
	if err != nil {
		return err
	}
	return c.reply(http.StatusOK, DeviceDebug{Device: id, Debug: d > 0, Until: until})
}
