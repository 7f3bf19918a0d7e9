package httpapi

import (
	"net/http"
	"strconv"
	"time"

	"holdfast/internal/audit"
)

// audited has an act in the audit log before its answer goes out. Whoever has shown no token has done nothing.
func (s *Server) audited(c *call) {
	switch {
	case c.role == 0 || !c.row.changes() && !c.row.bulk:
		return
	case c.aborted && c.noted:
		c.noted, c.detail = false, "its answer was cut off"
		_ = s.note(c, audit.Failed) // the log tells why it could not
		return
	}
	result := audit.Done
	switch {
	case c.w.code >= http.StatusInternalServerError:
		result = audit.Failed
	case c.w.code >= http.StatusBadRequest:
		result = audit.Refused
	}
	if err := s.note(c, result); err != nil && result == audit.Done {
		c.w.drop()
		c.w.Header().Del("Location")
		s.refuse(c, err)
	}
}

// note has an act in the audit log, once.
func (s *Server) note(c *call, result string) error {
	if c.noted {
		return nil
	}
	c.noted = true
	e := audit.Entry{
		Who: c.who, Role: c.role.String(), From: c.r.RemoteAddr, Act: c.row.id, Object: c.object, Result: result, Status: c.w.code, Code: c.code, Detail: c.detail,
	}
	if err := s.p.Audit.Record(e); err != nil {
		s.log.Error("act is not in the audit log", "who", c.who, "what", c.row.id, "object", c.object, "result", result, "err", err)
		if result == audit.Begun {
			return failf(codeAudit, "nothing was handed out, because it could not be noted in the audit log: %v", err)
		}
		return failf(codeAudit, "it was done, but could not be noted in the audit log: %v; look at what is there now before you try again", err)
	}
	return nil
}

// auditWrongTokens notes that somebody tries tokens: once for each time that an address begins.
func (s *Server) auditWrongTokens(c *call) {
	e := audit.Entry{Who: "unknown", From: c.r.RemoteAddr, Act: "wrong_tokens", Object: c.row.id, Result: audit.Refused, Code: codeUnauthorized}
	if err := s.p.Audit.Record(e); err != nil {
		s.log.Error("act is not in the audit log", "what", e.Act, "address", e.From, "err", err)
	}
}

func (s *Server) listAudit(c *call) (err error) {
	f := audit.Filter{Who: c.query.Get("who"), Act: c.query.Get("act"), Object: c.query.Get("object")}
	if f.Limit, err = c.limit(); err != nil {
		return err
	}
	if f.Before, err = c.number("before"); err != nil {
		return err
	}
	if v := c.query.Get("since"); v != "" {
		if f.Since, err = time.Parse(time.RFC3339, v); err != nil {
			return failf(codeBadQuery, "query: since has to be a time such as 2026-03-01T06:00:00Z")
		}
	}
	page := AuditPage{Records: []audit.Entry{}, Head: s.p.Audit.Head()} // before the page: what it names is in the log
	records, next, err := s.p.Audit.List(f)
	if err != nil {
		return err
	}
	page.Records = append(page.Records, records...)
	if next > 0 {
		page.Next = strconv.FormatUint(next, 10)
	}
	return c.reply(http.StatusOK, page)
}
